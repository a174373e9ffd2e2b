"""An alias names one generation on every replica, or none new: loads that fail somewhere, replicas that come and go."""

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

from molex_serve.errors import BadAdapter, BadRequest, Conflict, LoadBusy, ServeError, Unavailable, UnknownAdapter
from molex_serve.scale.directory import Directory
from molex_serve.scale.table import Outcome, Report, Table
from tests.serve.scale.cluster_of import Cluster


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    """Two replicas, started with law."""
    (tmp_path / "law").mkdir()
    with Cluster(tmp_path, {"law": str((tmp_path / "law").resolve())}) as made:
        made.write("law", "law-1")
        made.write("code", "code-1")
        yield made


def refused(outcome: Outcome, kind: type[ServeError], message: str) -> None:
    assert type(outcome.error) is kind, outcome
    assert message in str(outcome.error)


def names(cluster: Cluster) -> set[str]:
    """Every replica knows the same."""
    (known,) = {frozenset(member.follower.holdings().held) for member in cluster.members.values()}
    assert known == asyncio.run(cluster.directory.aliases())
    return set(known)


def resident(cluster: Cluster, name: str) -> set[str]:
    world = cluster.members[name].world
    world.residency.settle()
    return world.resident()


def test_a_load_reaches_every_replica(cluster: Cluster) -> None:
    outcome = cluster.load("poem", "code", pin=True)
    assert outcome.error is None
    assert [(r.replica, r.held["poem"].generation, r.held["poem"].residency) for r in outcome.reports] == [
        ("r0", "code-1", "device"),
        ("r1", "code-1", "device"),
    ]
    assert all(report.held["poem"].pinned for report in outcome.reports)
    assert cluster.say("poem") == {"r0": "code-1", "r1": "code-1"}
    assert names(cluster) == {"law", "poem"}


def test_a_reload_reaches_every_replica(cluster: Cluster) -> None:
    cluster.load("poem", "code")
    cluster.write("code", "code-2")
    assert cluster.load("poem", "code").error is None
    assert cluster.say("poem") == {"r0": "code-2", "r1": "code-2"}
    assert resident(cluster, "r0") == {"code-2"}, "the old generation keeps its place"


def test_what_one_replica_refuses_none_serves(cluster: Cluster) -> None:
    """The folder was overwritten before the reload: going back to the old generation from the disk would not do."""
    cluster.load("poem", "code")
    cluster.write("code", "code-2")
    cluster.members["r1"].world.write(str((cluster.root / "code").resolve()), "code-2", binds=False)
    outcome = cluster.load("poem", "code")
    refused(outcome, BadAdapter, "does not bind")
    assert [(r.replica, type(r.error), r.generation) for r in outcome.reports] == [
        ("r0", type(None), "code-2"),
        ("r1", BadAdapter, ""),
    ]
    assert cluster.say("poem") == {"r0": "code-1", "r1": "code-1"}
    assert resident(cluster, "r0") == {"code-1"}, "what was staged keeps its place"
    refused(cluster.load("new", "code"), BadAdapter, "does not bind")
    assert names(cluster) == {"law", "poem"}


def test_machines_that_see_different_folders(cluster: Cluster) -> None:
    cluster.members["r1"].world.write(str((cluster.root / "code").resolve()), "another")
    refused(cluster.load("poem", "code"), BadAdapter, "different adapters in 'code'")
    assert names(cluster) == {"law"}
    assert resident(cluster, "r0") == resident(cluster, "r1") == set()


@pytest.mark.parametrize(
    ("alias", "path", "kind", "message"),
    [
        ("base", "code", BadRequest, "cannot be an adapter's name"),
        ("poem", "../code", BadRequest, "not inside the adapter root"),
        ("poem", "nothing", BadAdapter, "no folder"),
    ],
)
def test_what_every_replica_refuses(
    cluster: Cluster, alias: str, path: str, kind: type[ServeError], message: str
) -> None:
    refused(cluster.load(alias, path), kind, message)
    assert names(cluster) == {"law"}


def test_compare_and_swap(cluster: Cluster) -> None:
    refused(cluster.load("poem", "code", "x"), Conflict, "expected generation x, and there is none")
    assert cluster.load("poem", "code", "").error is None
    refused(cluster.load("poem", "code", ""), Conflict, "expected generation none, and there is code-1")
    refused(cluster.load("poem", "law", "x"), Conflict, "expected generation x, and there is code-1")
    assert "stage" not in cluster.asked[-1:], "a replica was asked all the same"
    assert cluster.load("poem", "law", "code-1").error is None
    assert cluster.say("poem") == {"r0": "law-1", "r1": "law-1"}
    refused(cluster.unload("poem", "code-1"), Conflict, "expected generation code-1, and there is law-1")
    assert cluster.unload("poem", "law-1").error is None
    assert names(cluster) == {"law"}


def test_compare_and_swap_of_what_was_there_from_the_start(cluster: Cluster) -> None:
    """Each replica reads it by itself, when it is first asked for it."""
    refused(cluster.load("law", "code", "law-1"), Conflict, "one that was not read yet")
    cluster.members["r1"].says("law")
    refused(cluster.load("law", "code", ""), Conflict, "there is law-1")
    assert cluster.load("law", "code", "law-1").error is None
    assert cluster.say("law") == {"r0": "code-1", "r1": "code-1"}


def test_compare_and_swap_among_replicas_that_have_read_nothing(cluster: Cluster) -> None:
    """They took the places of those that had."""
    cluster.load("poem", "code")
    for name in ("r0", "r1"):
        cluster.members.pop(name).world.close()
        cluster.start(f"new {name}")
    refused(cluster.load("poem", "law", "law-1"), Conflict, "there is code-1")
    assert cluster.load("poem", "law", "code-1").error is None


def test_replicas_that_read_unlike_things_are_no_generation(cluster: Cluster) -> None:
    cluster.members["r0"].says("law")
    cluster.write("law", "law-2")
    cluster.members["r1"].says("law")
    refused(cluster.load("law", "code", "law-1"), Conflict, "law-2")
    assert cluster.load("law", "law").error is None
    assert cluster.say("law") == {"r0": "law-2", "r1": "law-2"}


def test_an_unload_reaches_every_replica(cluster: Cluster) -> None:
    refused(cluster.unload("nobody"), UnknownAdapter, "no adapter is called 'nobody'")
    cluster.say("law")
    outcome = cluster.unload("law")
    assert [(report.replica, dict(report.held)) for report in outcome.reports] == [("r0", {}), ("r1", {})]
    assert names(cluster) == set()
    assert resident(cluster, "r0") == resident(cluster, "r1") == set()
    assert cluster.members["r0"].forgotten == ["law"]


def test_who_starts_later_knows_what_the_others_know(cluster: Cluster) -> None:
    cluster.load("poem", "code")
    cluster.unload("law")
    late = cluster.start("late")
    assert names(cluster) == {"poem"}
    assert late.world.reads == {}, "it is read when it is asked for"
    assert late.says("poem") == "code-1"


def test_who_starts_later_serves_nothing_else(cluster: Cluster) -> None:
    cluster.load("poem", "code")
    cluster.write("code", "code-2")
    late = cluster.start("late")
    with pytest.raises(BadAdapter, match="code holds generation code-2, and code-1 when it was loaded: load it again"):
        late.says("poem")
    assert cluster.load("poem", "code").error is None
    assert cluster.say("poem") == {"r0": "code-2", "r1": "code-2", "late": "code-2"}


def test_who_missed_a_change_follows(cluster: Cluster) -> None:
    """Its handle was not known yet, or the call did not get through."""
    late = cluster.start("late")
    cluster.load("poem", "code")
    missing = cluster.members.pop("late")
    cluster.load("law", "code")
    cluster.unload("poem")
    cluster.members["late"] = missing
    assert late.says("law") == "law-1"
    cluster.news("late")
    assert names(cluster) == {"law"}
    assert late.says("law") == "code-1"


def test_who_is_lost_does_not_count(cluster: Cluster) -> None:
    cluster.lost = {"r1"}
    outcome = cluster.load("poem", "code")
    assert outcome.error is None
    assert [(report.replica, type(report.error)) for report in outcome.reports] == [
        ("r0", type(None)),
        ("", Unavailable),
    ]
    del cluster.members["r1"]
    cluster.lost = set()
    cluster.start("r2")
    assert cluster.say("poem") == {"r0": "code-1", "r2": "code-1"}


def test_without_replicas_nothing_is_loaded(cluster: Cluster) -> None:
    cluster.lost = {"r0", "r1"}
    refused(cluster.load("poem", "code"), Unavailable, "every replica was lost")
    members, cluster.members = cluster.members, {}
    refused(cluster.load("poem", "code"), Unavailable, "no replica runs")
    cluster.members, cluster.lost = members, set()
    assert names(cluster) == {"law"}


@pytest.mark.parametrize("first", ["a load", "news"])
def test_a_directory_that_lost_its_memory_learns_it_from_the_replicas(cluster: Cluster, first: str) -> None:
    cluster.load("poem", "code")
    cluster.directory = Directory(cluster.adapters, cluster)
    if first == "news":
        cluster.news("r0")
        assert cluster.members["r0"].says("poem") == "code-1"
    else:
        refused(cluster.load("poem", "code", ""), Conflict, "there is code-1")
    assert names(cluster) == {"law", "poem"}
    assert cluster.start("late").says("poem") == "code-1"


def test_what_a_lost_directory_had_staged_is_given_up_by_the_next_load(cluster: Cluster) -> None:
    asyncio.run(cluster.reports("stage", "poem", "code", False, 1))
    assert resident(cluster, "r0") == {"code-1"}
    assert cluster.load("other", "law").error is None
    assert names(cluster) == {"law", "other"}
    assert resident(cluster, "r0") == {"law-1"}


def test_one_load_at_a_time(cluster: Cluster) -> None:
    async def both() -> list[Outcome]:
        entered, go = asyncio.Event(), asyncio.Event()
        reports = cluster.reports

        async def slow(method: str, *args: object) -> object:
            entered.set()
            await go.wait()
            return await reports(method, *args)

        cluster.reports = slow  # type: ignore[method-assign, assignment]
        first = asyncio.ensure_future(cluster.directory.load("poem", "code", None, False))
        await entered.wait()
        second = await asyncio.wait_for(cluster.directory.load("poem", "law", None, False), 10)
        third = asyncio.ensure_future(cluster.directory.unload("poem", None))
        go.set()
        return [second, await first, await third]

    second, first, third = asyncio.run(both())
    refused(second, LoadBusy, "another adapter is being loaded")
    assert first.error is None
    assert third.error is None, "an unload waits for its turn"
    assert names(cluster) == {"law"}


def test_an_old_table_is_not_followed(cluster: Cluster) -> None:
    cluster.load("poem", "code")
    report = cluster.members["r0"].follower.follow(Table())
    assert isinstance(report, Report)
    assert set(report.held) == {"law", "poem"}

"""From a configuration's arguments to deployments, and who imports what."""

import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
from pydantic import ValidationError

from molex.errors import ConfigError
from molex_serve.options import Start

pytest.importorskip("ray", reason="the extra `ray` is not installed")

from molex_serve.scale.app import at_home, build, engines
from molex_serve.scale.settings import Arguments, Scaling


def test_every_option_is_an_argument() -> None:
    options = {field.name for field in fields(Start)} - {"host", "port"}
    assert set(Arguments.model_fields) == options | {field.name for field in fields(Scaling)}
    defaults = {name: Arguments.model_fields[name].default for name in (field.name for field in fields(Scaling))}
    assert Scaling(**defaults) == Scaling()


def test_the_application(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "law").mkdir()
    arguments = Arguments(model="org/base", adapters={"law": "law", "half": "law:0.5"}, num_gpus=1, replicas=3)
    ingress = build(arguments)._bound_deployment
    engine, directory = ingress.init_args
    assert ingress.name == "Ingress"
    given, adapters, _ = engine._bound_deployment.init_args
    assert (engine._bound_deployment.name, given.model) == ("Engine", "org/base")
    assert adapters == {"law": str(tmp_path / "law"), "half": "law:0.5"}
    assert directory._bound_deployment.init_args == (adapters,)
    assert engine._bound_deployment.num_replicas == 3


def test_paths_mean_the_same_everywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base").mkdir()
    arguments = Arguments(model="base", adapter_root=".", api_key=None, admin_key=None)
    given = Start(
        **arguments.model_dump(exclude={"adapters", *(field.name for field in fields(Scaling))}),
        adapters=[],
        host="",
        port=0,
    )
    assert (at_home(given).model, at_home(given).adapter_root) == (str(tmp_path / "base"), str(tmp_path))


@pytest.mark.parametrize("arguments", [Arguments(), Arguments(model="a", demo=Path("b"))])
def test_one_base(arguments: Arguments) -> None:
    with pytest.raises(ConfigError, match="give a base with `model`, or"):
        build(arguments)


def test_wrong_arguments() -> None:
    with pytest.raises(ValidationError, match="replica"):
        Arguments.model_validate({"model": "x", "replica": 2})
    for wrong in ({"replicas": 0}, {"replicas": 3, "max_replicas": 2}, {"max_queued_requests": 0}):
        with pytest.raises(ConfigError):
            Scaling(**wrong)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="dtype"):
        build(Arguments(model="x", dtype="int8", num_gpus=0))


def test_as_many_as_the_load_asks_for() -> None:
    asked = engines(Scaling(replicas=2, max_replicas=5, num_gpus=0.5, max_ongoing_requests=10))
    assert asked["autoscaling_config"] == {"min_replicas": 2, "max_replicas": 5, "target_ongoing_requests": 5}
    assert asked["ray_actor_options"] == {"num_cpus": 1, "num_gpus": 0.5}
    assert "num_replicas" not in asked


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("molex_serve.starting", "ray"),
        ("molex_serve.scale.app", "torch"),
        ("molex_serve.scale.replica", "torch"),
        ("molex_serve.scale.ingress", "torch"),
        ("molex_serve.scale.ingress", "ray"),
    ],
)
def test_nobody_loads_what_he_does_not_need(module: str, absent: str) -> None:
    code = f"import sys, {module}; sys.exit('{absent}' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=300).returncode == 0


def test_without_ray_it_says_what_to_install() -> None:
    code = "import sys; sys.modules['ray'] = None; from molex.cli import main; main()"
    command = [sys.executable, "-c", code, "serve", "--model", "x", "--replicas", "2"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert run.returncode == 1
    assert "pip install 'molex[ray]'" in run.stderr

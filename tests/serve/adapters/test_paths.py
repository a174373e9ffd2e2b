"""Folders named over HTTP: nothing outside of the root is ever reached, and what is wrong is said."""

import json
from pathlib import Path

import pytest

from molex_serve.adapters.paths import inside
from molex_serve.errors import BadAdapter, BadRequest


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for folder in ("root/law", "root/group/code", "secret", "rootless"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "adapter_config.json").write_text("{}")
        (tmp_path / folder / "adapter_model.safetensors").write_text("weights")
    return tmp_path / "root"


@pytest.mark.parametrize("given", ["law", "./law/", "group/../law", "group/code", "{root}/law", "link"])
def test_inside(root: Path, given: str) -> None:
    (root / "link").symlink_to(root / "law")
    found = inside(root, given.format(root=root))
    assert found in (root / "law", root / "group" / "code")
    assert found == found.resolve()


@pytest.mark.parametrize(
    "given",
    ["", ".", "..", "../secret", "law/../../secret", "{root}less", "/etc", "/", "link", "deep/link", "nowhere/../../x"],
)
def test_outside(root: Path, given: str) -> None:
    (root / "link").symlink_to(root.parent / "secret")
    (root / "deep").symlink_to(root.parent)
    with pytest.raises(BadRequest, match="adapter root"):
        inside(root, given.format(root=root))


def test_outside_says_nothing_about_what_is_there(root: Path) -> None:
    told = []
    for given in ("../secret", "../absent"):
        with pytest.raises(BadRequest) as error:
            inside(root, given)
        told.append(str(error.value).replace(given, ""))
    assert told[0] == told[1]


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json", "notes", "sub/deep.json"])
def test_links_that_lead_out(root: Path, name: str) -> None:
    place = root / "law" / name
    place.parent.mkdir(exist_ok=True)
    place.unlink(missing_ok=True)
    place.symlink_to(root.parent / "secret" / "adapter_config.json")
    with pytest.raises(BadAdapter, match=f"lead out of the adapter root: {name}"):
        inside(root, "law")


def test_a_folder_that_leads_out(root: Path) -> None:
    (root / "law" / "more").symlink_to(root.parent / "secret")
    with pytest.raises(BadAdapter, match="lead out of the adapter root: more"):
        inside(root, "law")


def test_links_inside_the_root_are_as_good_as_files(root: Path) -> None:
    """As the hub's cache has them."""
    weights = root / "law" / "adapter_model.safetensors"
    weights.unlink()
    weights.symlink_to(root / "group" / "code" / "adapter_model.safetensors")
    assert inside(root, "law") == root / "law"


def test_what_is_not_there(root: Path) -> None:
    (root / "file.safetensors").write_text("")
    for given in ("absent", "file.safetensors"):
        with pytest.raises(BadAdapter, match="is no folder in the adapter root"):
            inside(root, given)


def test_weights_in_another_format(root: Path) -> None:
    (root / "law" / "adapter_model.safetensors").rename(root / "law" / "adapter_model.bin")
    with pytest.raises(BadAdapter, match=r"no \.safetensors file"):
        inside(root, "law")


@pytest.mark.parametrize("given", ["law\0", "x" * 5000, "loop"])
def test_no_path_at_all(root: Path, given: str) -> None:
    (root / "loop").symlink_to(root / "loop")
    with pytest.raises((BadRequest, BadAdapter), match=r"is no path|no folder in the adapter root"):
        inside(root, given)


def test_without_a_root() -> None:
    with pytest.raises(BadRequest, match="start the server with an adapter root"):
        inside(None, "law")


def blended(root: Path, *members: str) -> str:
    (root / "blend").mkdir()
    (root / "blend" / "blend.json").write_text(json.dumps({"adapters": dict.fromkeys(members, 0.5)}))
    return "blend"


def test_a_blend_of_what_is_inside(root: Path) -> None:
    assert inside(root, blended(root, "../law", "../group/code")) == root / "blend"


@pytest.mark.parametrize("member", ["../../secret", "/etc"])
def test_a_blend_that_reaches_out(root: Path, member: str) -> None:
    with pytest.raises(BadRequest, match="is not inside the adapter root"):
        inside(root, blended(root, "../law", member))


def test_a_blend_of_what_is_no_adapter(root: Path) -> None:
    (root / "law" / "adapter_model.safetensors").unlink()
    with pytest.raises(BadAdapter, match=r"'\.\./law' has no \.safetensors"):
        inside(root, blended(root, "../law"))
    (root / "blend" / "blend.json").write_text("[")
    with pytest.raises(BadAdapter, match="it is not JSON"):
        inside(root, "blend")

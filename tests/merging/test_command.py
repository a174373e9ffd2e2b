"""molex merge, run in this process as the command line runs it."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from typer import Typer
from typer.testing import CliRunner, Result

from molex.commands import merge as command
from molex.errors import ConfigError, MolexError
from molex.io.peft import read_adapter, write_adapter
from molex.merging.recipe import read_recipe
from molex.workbench import load_base, load_tokenizer
from tests.merging.adapters import adapter_for, saved_base
from tests.merging.loras import dense
from tests.merging.test_of_mixture import with_static
from tests.models import batch_for, mixture_of, tiny

app = Typer()
app.command()(command.merge)


def run(*arguments: object, ok: bool = True) -> Result:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "200"})
    if ok and result.exception is not None:
        raise result.exception
    return result


def refused(*arguments: object) -> str:
    error = run(*arguments, ok=False).exception
    assert isinstance(error, MolexError), error
    return str(error)


@pytest.fixture
def folders(tmp_path: Path) -> dict[str, Path]:
    base = saved_base(tmp_path / "base")
    for seed, name in enumerate("xy"):
        write_adapter(adapter_for(tiny("llama"), ("q_proj", "up_proj"), seed=seed), tmp_path / name)
    return {"base": base, "x": tmp_path / "x", "y": tmp_path / "y", "out": tmp_path / "out"}


def test_direct_form_and_its_recipe_give_the_same(folders: dict[str, Path], tmp_path: Path) -> None:
    adapters = ["--adapter", f"x={folders['x']}:0.5", "--adapter", f"y={folders['y']}:2"]
    told = run("--base", folders["base"], *adapters, "--rule", "ties", "--set", "density=0.5", "--out", folders["out"])
    assert "4 linears changed" in told.output
    again = tmp_path / "again"
    run(folders["out"] / command.RECIPE_FILE, "--out", again)
    first, second = (load_file(out / "model.safetensors") for out in (folders["out"], again))
    assert all(torch.equal(first[name], tensor) for name, tensor in second.items())
    recipe = read_recipe(again / command.RECIPE_FILE, {})
    assert recipe.weights == {"x": 0.5, "y": 2.0}
    assert recipe.parameters["density"] == 0.5
    assert AutoModelForCausalLM.from_pretrained(again)


def test_as_lora_with_flags_over_a_file(folders: dict[str, Path], tmp_path: Path) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text(yaml.safe_dump({"base": str(folders["base"]), "adapters": {"x": str(folders["x"])}, "rank": 3}))
    run(recipe, "--as", "lora", "--rank", "2", "--out", folders["out"])
    assert {lora.A.shape[0] for lora in read_adapter(folders["out"]).factors.values()} == {2}
    assert yaml.safe_load((folders["out"] / command.RECIPE_FILE).read_text())["rank"] == 2


def test_dry_run_reads_headers_only(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def no_values(*_: object) -> None:
        raise AssertionError("a dry run read values")

    monkeypatch.setattr("molex.io.stream.Slot.read", no_values)
    monkeypatch.setattr("molex.io.peft.read_tensors", no_values)
    told = run("--base", folders["base"], "--adapter", f"x={folders['x']}", "--out", folders["out"], "--dry-run")
    assert "model.layers.1.mlp.up_proj" in told.output
    assert "model.safetensors" in told.output
    assert "nothing was written" in told.output
    assert not folders["out"].exists()


def test_a_mixture_exactly_as_dense_and_as_lora(tmp_path: Path) -> None:
    saved_base(tmp_path / "base")

    mixture = with_static()
    mixture.model.config._name_or_path = str(tmp_path / "base")
    mixture.save(tmp_path / "mixture")
    batch = batch_for(mixture.model)
    with torch.no_grad():
        wanted = mixture.model(**batch).logits
    run(tmp_path / "mixture", "--out", tmp_path / "dense")
    run(tmp_path / "mixture", "--as", "lora", "--out", tmp_path / "lora")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    with torch.no_grad():
        torch.testing.assert_close(loaded(**batch).logits, wanted, rtol=1e-4, atol=1e-5)
        base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    factors = read_adapter(tmp_path / "lora").factors
    name = "model.layers.0.self_attn.q_proj"
    update = loaded.get_submodule(name).weight - base.get_submodule(name).weight
    torch.testing.assert_close(update.double(), dense(factors[name]), rtol=1e-3, atol=1e-5)
    assert (tmp_path / "dense" / "chat_template.jinja").is_file()


def test_losses_of_a_mixtures_merges(tmp_path: Path) -> None:
    import molex

    base = tmp_path / "base"
    load_base().save_pretrained(base)
    load_tokenizer().save_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base)
    molex.convert(model, molex.preset("mola", num_experts=2, top_k=1, rank=2)).save(tmp_path / "mixture")
    rows = [
        {"prompt": "upper: ab\n= ", "completion": "AB"},
        {"messages": [{"role": "user", "content": "upper: ab"}, {"role": "assistant", "content": "AB"}]},
        {"text": "upper: ab\n= AB"},
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    told = run(tmp_path / "mixture", "--validate", tmp_path / "rows.jsonl")
    for name in ("base", "mixture", "linear", "lego", "knots", "nothing was written"):
        assert name in told.output
    (tmp_path / "rows.jsonl").write_text('{"question": "?"}')
    assert "row 1 is question" in refused(tmp_path / "mixture", "--validate", tmp_path / "rows.jsonl")


def test_refusals(folders: dict[str, Path], tmp_path: Path) -> None:
    base, one = ["--base", folders["base"]], ["--adapter", f"x={folders['x']}"]
    assert "--out FOLDER" in refused(*base, *one)
    assert "name=path" in refused(*base, "--adapter", "x", "--out", folders["out"])
    assert "each name once" in refused(*base, *one, *one, "--out", folders["out"])
    assert "give name=value" in refused(*base, *one, "--rule", "ties", "--set", "density", "--out", folders["out"])
    assert "a mixture" in refused(*base, *one, "--validate", "rows.jsonl", "--out", folders["out"])
    mixture_of().save(tmp_path / "mixture")
    assert "is a mixture" in refused(*base, "--adapter", f"x={tmp_path / 'mixture'}", "--dry-run")
    assert not folders["out"].exists()
    with pytest.raises(ConfigError, match="say what is merged"):
        run("--out", folders["out"])

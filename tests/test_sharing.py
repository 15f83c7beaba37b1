"""Patches between people: which model one was made for, its model card, and the Hugging Face hub."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
import yaml
from families import tiny
from models import tiny_gemma3, tiny_multimodal_gemma3, tiny_tokenizer
from patches import random_patch
from typer.testing import CliRunner

import thought_kernels as tk
from thought_kernels.cli import app, options
from thought_kernels.demo import CHECKPOINT
from thought_kernels.evaluation.figures.report import Line, Report
from thought_kernels.evaluation.figures.section import Section
from thought_kernels.evaluation.measures.intervals import Interval
from thought_kernels.patches.card import CARD_FILE, model_card
from thought_kernels.patches.identity import differences, identity
from thought_kernels.patches.patch import ThoughtPatch
from thought_kernels.patches.storage import RECORD_FILE, TENSOR_FILE


def made_for(model: Any, tokenizer: Any = None, **provenance: Any) -> ThoughtPatch:
    return random_patch(provenance={"base": identity(model, tokenizer), **provenance})


def test_transmute_remembers_the_model_and_from_pretrained_checks_it(
    tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    model, tokenizer = tk.load(CHECKPOINT)
    patch = tk.transmute(model, tokenizer, "Sum the numbers", [{"prompt": "4 7 2", "completion": "3"}])
    patch.save_pretrained(tmp_path)
    recwarn.clear()
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        same = tk.load(CHECKPOINT, dtype=dtype)[0]
        loaded = ThoughtPatch.from_pretrained(tmp_path, model=same, tokenizer=tokenizer, mismatch="refuse")
        assert loaded.check(same, tokenizer) == [] and not recwarn.list
    model.model.layers[0].self_attn.o_proj.weight.data.mul_(1.01)
    with pytest.warns(
        UserWarning, match="check: model should be the one that .* differ by up to 1.1 % in 1 of 7"
    ) as told:
        ThoughtPatch.from_pretrained(tmp_path, model=model, tokenizer=tokenizer)
    assert told[0].filename == __file__


@pytest.mark.parametrize("made", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("loaded", [torch.float32, torch.float16])
def test_the_same_weights_in_half_precision_are_the_same(made: torch.dtype, loaded: torch.dtype) -> None:
    stored = tiny_gemma3(dtype=torch.float32)
    model, other = (copy.deepcopy(stored).to(dtype) for dtype in (made, loaded))
    if made == torch.bfloat16:  # which float32 cannot undo: what is stored is then what was rounded
        other = copy.deepcopy(model).to(loaded)
    assert made_for(model).check(other, mismatch="refuse") == []
    other.model.layers[0].self_attn.o_proj.weight.data[:, ::7].mul_(1.01)
    with pytest.raises(ValueError, match="differ by up to .* in 1 of 7"):
        made_for(model).check(other, mismatch="refuse")


def test_a_folder_is_no_repository_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = tiny_gemma3(vocab_size=len(tiny_tokenizer())), tiny_tokenizer()
    model.save_pretrained(tmp_path / "models" / "gemma")
    tokenizer.save_pretrained(tmp_path / "models" / "gemma")
    monkeypatch.chdir(tmp_path)
    patch = tk.transmute(*tk.load("models/gemma"), "Sum", [{"prompt": "4 7", "completion": "3"}])
    assert patch.provenance["model"] == str(tmp_path / "models" / "gemma")
    assert "base_model:" not in model_card(patch) and "weights of gemma that" in model_card(patch)
    named = random_patch(provenance={"model": "google/gemma-3-270m"})
    assert "base_model: google/gemma-3-270m" in model_card(named)


def test_another_model_is_told_refused_or_ignored(recwarn: pytest.WarningsRecorder) -> None:
    tokenizer, other_words = tiny_tokenizer(), tiny_tokenizer((("a", "b"),))
    patch = made_for(tiny_gemma3(0), tokenizer)
    assert patch.check(tiny_gemma3(0), tokenizer, mismatch="refuse") == []
    assert patch.check(tiny_gemma3(0)) == []  # without a tokenizer none is compared
    with pytest.raises(ValueError, match="check: model must be the one .* weights are others .7 of 7 compared"):
        patch.check(tiny_gemma3(1), tokenizer, mismatch="refuse")
    assert len(patch.check(tiny_gemma3(1), tokenizer, mismatch="ignore")) == 1 and not recwarn.list
    with pytest.warns(UserWarning, match="its tokenizer has another vocabulary"):
        patch.check(tiny_gemma3(0), other_words)
    other_words = tiny_tokenizer(template="{{ messages[0]['content'] }}")
    assert patch.check(tiny_gemma3(0), other_words, mismatch="ignore") == ["its chat template is another"]
    with pytest.raises(ValueError, match="mismatch must be one of warn, refuse, ignore, got 'quietly'"):
        patch.check(tiny_gemma3(0), mismatch="quietly")
    with pytest.raises(ValueError, match="check: patch must have the model's hidden size 48, got 36"):
        patch.check(tiny("granite"), mismatch="ignore")  # what does not fit is never let pass


def test_tokens_that_come_later_make_another_tokenizer() -> None:
    model, tokenizer = tiny_gemma3(0), tiny_tokenizer()
    patch = made_for(model, tokenizer)
    assert patch.check(model, tokenizer, mismatch="refuse") == []
    tokenizer.add_tokens("<new>")
    with pytest.warns(UserWarning, match="tokenizer has another vocabulary"):
        patch.check(model, tokenizer)


def test_rounding_and_quantising_are_told_from_other_weights() -> None:
    model = tiny_gemma3()
    recorded = identity(model)
    eighths = tiny_gemma3()
    for parameter in eighths.parameters():
        step = parameter.data.abs().max() / 127
        parameter.data.copy_((parameter.data / step).round() * step)
    (told,) = differences(recorded, eighths)
    assert told.startswith("its weights differ by up to ") and "quantised" in told
    deeper = tiny_gemma3(layer_types=["full_attention"] * 4, vocab_size=65)
    assert {"its num_hidden_layers is 4, not 3", "its vocab_size is 65, not 64"} <= set(differences(recorded, deeper))
    assert json.loads(json.dumps(recorded)) == recorded
    packed = tiny_gemma3()
    for layer in packed.model.layers:  # quantised weights are integers, or tensors of a kind of their own
        layer.self_attn.o_proj.weight = torch.nn.Parameter(torch.zeros(36, 40, dtype=torch.int8), requires_grad=False)
    assert differences(recorded, packed) == [] and len(identity(packed)["weights"]) == 4
    text = identity(tiny_multimodal_gemma3())
    assert text["config"]["model_type"] == "gemma3_text" and len(text["weights"]) == 7


def test_an_older_patch_and_a_control_vector_are_held_against_what_they_remember() -> None:
    old = random_patch(provenance={"model_type": "gemma3_text", "num_hidden_layers": 3})
    assert old.check(tiny_gemma3(), tiny_tokenizer(), mismatch="refuse") == []
    with pytest.raises(ValueError, match="its model_type is gemma3_text, not llama"):
        random_patch(provenance={"model_type": "llama"}).check(tiny_gemma3(), mismatch="refuse")


def front_matter(card: str) -> dict[str, Any]:
    return yaml.safe_load(card.split("---")[1])


def report() -> dict[str, Any]:
    section = Section("effect", "Effect")
    section.add("patched", "accuracy", Interval(0.75, 0.5, 0.9), inputs=16)
    section.add("patched", "recovered", 0.875)
    section.add("patched", "accuracy", 0.1, x=2.0)  # swept: not shown
    line = Line("Works: does it do what the instruction does?", "partly", "Recovered effect 0.875.")
    return Report({}, {"effect": section}, [line], ["Few inputs."], 1.0).to_dict()


def test_a_card_tells_the_provenance_and_the_evaluation() -> None:
    made = {
        "instruction": "Answer in French.\n````\nBe | brief.", "model": "google/gemma-3-1b-it", "estimator": "ridge",
        "ridge": 1.0, "examples": 8, "written_inputs": ["a", "b"], "format": "{prompt} -> {completion}\n",
    }  # fmt: skip
    patch = random_patch(provenance=made)
    card = model_card(patch, report())
    front = front_matter(card)
    assert front["library_name"] == "thought_kernels" and front["base_model"] == "google/gemma-3-1b-it"
    assert "\n# Answer in French.\n" in card
    assert "`````text\nAnswer in French.\n````\nBe | brief.\n`````" in card  # a fence longer than any inside
    assert "| estimator | `ridge` |" in card and "| inputs that the model wrote | `2` |" in card
    assert "tk.load('google/gemma-3-1b-it')" in card and "| blocks | `0, 2` |" in card
    assert "| Works: does it do what the instruction does? | partly | Recovered effect 0.875. |" in card
    assert "| effect | patched | accuracy | 0.75 | 0.5 to 0.9 | 16 |" in card
    assert "| effect | patched | recovered | 0.875 | – | – |" in card and "- Few inputs." in card
    assert "0.1 |" not in card
    assert "Not evaluated" in model_card(patch) and "Not evaluated" not in card
    with pytest.raises(ValueError, match="model_card: evaluation must be what evaluate"):
        model_card(patch, {"verdict": [{}]})


@pytest.mark.parametrize(
    ("made", "title"),
    [
        ({}, "# Thought patch"),
        ({"control_vector": "happy.gguf"}, "# Thought patch of happy.gguf"),
        ({"instruction": "word " * 30}, "# " + ("word " * 12).strip() + "…"),
        ({"instruction": [{"role": "user", "content": "Hi"}]}, '# {"role": "user", "content": "Hi"}'),
        ({"model": "/srv/somebody/models/gemma"}, "# Thought patch"),
    ],
)
def test_cards_of_other_patches(made: dict[str, Any], title: str) -> None:
    card = model_card(random_patch(provenance=made))
    assert f"\n{title}\n" in card and "base_model" not in front_matter(card)
    assert "somebody" not in card


def test_a_card_of_somebody_else_is_left_alone(tmp_path: Path) -> None:
    patch = random_patch(provenance={"instruction": "one"})
    patch.save_pretrained(tmp_path, evaluation=report())
    assert "0.875" in (tmp_path / CARD_FILE).read_text(encoding="utf-8")
    random_patch(1, provenance={"instruction": "two"}).save_pretrained(tmp_path)  # what was measured was another patch
    card = (tmp_path / CARD_FILE).read_text(encoding="utf-8")
    assert "# two" in card and "0.875" not in card
    for own in ("my own words", card.replace("# two", "# two, in my words")):
        (tmp_path / CARD_FILE).write_text(own, encoding="utf-8")
        patch.save_pretrained(tmp_path)
        assert (tmp_path / CARD_FILE).read_text(encoding="utf-8") == own
        with pytest.warns(UserWarning, match="^save_pretrained: README.md should be this package's to hold the eval"):
            patch.save_pretrained(tmp_path, evaluation=report())
        assert (tmp_path / CARD_FILE).read_text(encoding="utf-8") == own
    assert ThoughtPatch.from_pretrained(tmp_path).provenance["instruction"] == "one"


class Hub:
    """A hub in a folder, with the client's functions that are used."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def HfApi(self, token: Any = None) -> Hub:
        return self

    def file_exists(self, repository: str, name: str) -> bool:
        return (self.folder / repository / name).exists()

    def hf_hub_download(self, repository: str, name: str) -> str:
        return str(self.folder / repository / name)

    def create_repo(self, repository: str, *, private: Any, exist_ok: bool) -> str:
        (self.folder / repository).mkdir(parents=True, exist_ok=exist_ok)
        return f"https://hub/{repository}"

    def upload_folder(self, *, repo_id: str, folder_path: str, allow_patterns: list[str], commit_message: str) -> None:
        for name in allow_patterns:
            shutil.copy(Path(folder_path) / name, self.folder / repo_id / name)

    def snapshot_download(
        self, repository: str, *, revision: Any, allow_patterns: list[str], local_files_only: bool
    ) -> str:
        if local_files_only:
            raise OSError("not in the cache")
        if revision == "gone" or not (self.folder / repository).exists():
            raise OSError("404 Client Error")
        return str(self.folder / repository)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    found = Hub(tmp_path / "hub")
    for name in ("HfApi", "snapshot_download"):
        monkeypatch.setattr(huggingface_hub, name, getattr(found, name))
    return found.folder


def test_a_patch_goes_to_the_hub_and_comes_back(hub: Path, tmp_path: Path) -> None:
    patch = random_patch(provenance={"instruction": "one", "model": "/srv/somebody/models/gemma"})
    of_a_sum = patch + random_patch(1, provenance={"instruction": "two", "model": "/srv/somebody/models/gemma"})
    of_a_sum.push_to_hub("me/sum")
    assert b"somebody" not in (hub / "me" / "sum" / RECORD_FILE).read_bytes()
    assert patch.push_to_hub("me/patch", evaluation=report()) == "https://hub/me/patch"
    names = {TENSOR_FILE, RECORD_FILE, CARD_FILE}
    assert {path.name for path in (hub / "me" / "patch").iterdir()} == names
    assert not any(b"somebody" in (hub / "me" / "patch" / name).read_bytes() for name in names)
    back = ThoughtPatch.from_pretrained("me/patch")
    assert back.provenance["model"] == "gemma"
    assert torch.equal(back.matrix(2, "mlp"), patch.matrix(2, "mlp"))
    for name, revision in (("me/nothing", None), ("me/patch", "gone")):
        with pytest.raises(ValueError, match=f"from_pretrained: .*, got '{name}', where no folder is; .* 404 Client"):
            ThoughtPatch.from_pretrained(name, revision=revision)
    with pytest.raises(ValueError, match="from_pretrained: .* not in the cache"):
        ThoughtPatch.from_pretrained("me/patch", offline=True)
    with pytest.raises(ValueError, match="push_to_hub: repository must be 'owner/name', got 'patch'"):
        patch.push_to_hub("patch")
    with pytest.raises(ValueError, match="model_card: evaluation"):
        patch.push_to_hub("me/other", evaluation={"verdict": 3})
    assert not (hub / "me" / "other").exists()
    patch.save_pretrained(tmp_path / "here")
    with pytest.raises(ValueError, match="from_pretrained: revision must be None for a folder here, got 'main'"):
        ThoughtPatch.from_pretrained(tmp_path / "here", revision="main")


def test_a_card_on_the_hub_that_somebody_changed_is_left_alone(hub: Path) -> None:
    patch, there = random_patch(provenance={"instruction": "one"}), hub / "me" / "patch" / CARD_FILE
    patch.push_to_hub("me/patch")
    patch.push_to_hub("me/patch", evaluation=report())
    assert "0.875" in there.read_text(encoding="utf-8")
    there.write_text("my own words")
    patch.push_to_hub("me/patch")
    assert there.read_text() == "my own words"
    patch.push_to_hub("me/patch", card="other words")
    assert there.read_text() == "other words"


def test_a_sum_remembers_the_model_of_each_part() -> None:
    model, other = tiny_gemma3(0), tiny_gemma3(1)
    patch, vector = made_for(model, instruction="one"), random_patch(1, provenance={"control_vector": "happy"})
    for joined in (patch + vector, vector + patch, patch + made_for(model, instruction="two")):
        assert joined.check(model, mismatch="refuse") == []
        with pytest.raises(ValueError, match="check: model must be the one .* its weights are others"):
            joined.check(other, mismatch="refuse")
    mixed = patch + made_for(other, instruction="two")
    for each in (model, other):
        with pytest.raises(ValueError, match="its weights are others"):
            mixed.check(each, mismatch="refuse")


def test_commands_push_and_check(hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for console in (options.out, options.err):
        monkeypatch.setattr(console, "_width", 300)

    def run(*arguments: Any) -> Any:
        return CliRunner().invoke(app, [str(argument) for argument in arguments])

    tokenizer = tiny_tokenizer()
    for seed in (0, 1):
        tiny_gemma3(seed, vocab_size=len(tokenizer)).save_pretrained(tmp_path / f"model {seed}")
        tokenizer.save_pretrained(tmp_path / f"model {seed}")
    patch = made_for(tk.load(tmp_path / "model 0")[0], tokenizer, instruction="one")
    patch.save_pretrained(tmp_path / "patch")
    (tmp_path / "evaluation.json").write_text(json.dumps(report()))
    pushed = run("push", tmp_path / "patch", "me/patch", "--evaluation", tmp_path / "evaluation.json")
    assert pushed.exit_code == 0 and "pushed to https://hub/me/patch" in pushed.stdout, pushed.output
    assert "0.875" in (hub / "me" / "patch" / CARD_FILE).read_text(encoding="utf-8")
    asked = ("generate", "-p", "3 4", "--patch", tmp_path / "patch", "--max-new-tokens", 1)
    refused = run(*asked, "-m", tmp_path / "model 1", "--mismatch", "refuse")
    assert refused.exit_code == 1 and "check: model must be the one that the patch was made for" in refused.stderr
    assert run(*asked, "-m", tmp_path / "model 0", "--mismatch", "refuse").exit_code == 0
    measured = ("evaluate", tmp_path / "model 1", "--patch", tmp_path / "patch", "--held-out", tmp_path / "in.txt")
    (tmp_path / "in.txt").write_text("3 4\n5 6\n")
    refused = run(*measured, "--output", tmp_path / "report", "--mismatch", "refuse")
    assert refused.exit_code == 1 and "check: model must be the one that the patch was made for" in refused.stderr
    (hub / "me" / "patch" / CARD_FILE).write_text("words on the hub")
    assert run("push", tmp_path / "patch", "me/patch").exit_code == 0
    assert (hub / "me" / "patch" / CARD_FILE).read_text() == "words on the hub"
    (tmp_path / "patch" / CARD_FILE).write_text("my own words")
    assert run("push", tmp_path / "patch", "me/patch").exit_code == 0
    assert (hub / "me" / "patch" / CARD_FILE).read_text() == "my own words"
    assert run("push", tmp_path / "nowhere", "me/patch").exit_code == 2
    (tmp_path / "evaluation.json").write_text("{")
    wrong = run("push", tmp_path / "patch", "me/patch", "--evaluation", tmp_path / "evaluation.json")
    assert wrong.exit_code == 2 and "--evaluation must be a JSON file" in wrong.stderr

"""``lq quantize``: folders in, folders out, and what it says when it cannot."""

import json
import runpy
import sys

import pytest
import torch
from lq_torch import GGMLTensor, Int4Tensor, Int8Tensor, IntxTensor, LowBitTensor, load
from lq_torch.cli import main

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

WORDS = [f"word{i}" for i in range(60)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random LLaMA whose tokens are words."""
    path = tmp_path_factory.mktemp("model")
    config = transformers.LlamaConfig(
        vocab_size=len(WORDS) + 1,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32,
        initializer_range=0.2,
        bos_token_id=None,
        eos_token_id=None,
    )
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(path)
    vocabulary = {word: number for number, word in enumerate([*WORDS, "[UNK]"])}
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]").save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    order = torch.randint(len(WORDS), (500,), generator=torch.Generator().manual_seed(0)).tolist()
    path = tmp_path_factory.mktemp("text") / "calibration.txt"
    path.write_text(" ".join(WORDS[number] for number in order), encoding="utf-8")
    return path


@pytest.fixture
def lq(capsys):
    """Run the command; returns exit status, standard output and standard error."""

    def run(*arguments):
        try:
            main([str(argument) for argument in arguments])
            status = 0
        except SystemExit as end:
            status = end.code
        return status, *capsys.readouterr()

    return run


def low_bit(model):
    return {name: weight for name, weight in model.named_parameters() if isinstance(weight, LowBitTensor)}


@pytest.mark.parametrize(
    ("arguments", "kind", "bits"),
    [
        (("--algorithm", "rtn"), Int4Tensor, 4.5),
        (("--asymmetric", "--algorithm", "mse"), Int4Tensor, 5.0),
        (("--algorithm", "hqq", "--scale-dtype", "float32"), Int4Tensor, 5.0),
        (("--scheme", "int3", "--asymmetric"), IntxTensor, 4.0),
        (("--scheme", "int8"), Int8Tensor, 8 + 32 * (6 * 64 + 96) / (7 * 64 * 96)),
    ],
    ids=["rtn", "mse-asym", "hqq-fp32", "int3-asym", "int8"],
)
def test_without_data(lq, folder, tmp_path, arguments, kind, bits):
    group = () if kind is Int8Tensor else ("--group-size", 32)
    status, out, err = lq("quantize", folder, tmp_path, *group, "--device", "cpu", *arguments)
    assert (status, err) == (0, "")
    found = low_bit(load(tmp_path))
    assert {type(weight) for weight in found.values()} == {kind}
    assert len(found) == 14
    if kind is not Int8Tensor:
        assert f"in {bits:.3f} bits each" in out
    assert str(tmp_path) in out
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer("word3 word0")["input_ids"] == [3, 0]


@pytest.mark.parametrize("algorithm", ["gptq", "awq", "awq+gptq"])
def test_with_a_calibration_text(lq, folder, text, tmp_path, algorithm):
    out = tmp_path / "out"
    status, said, _ = lq(
        *("quantize", folder, out, "--scheme", "int4", "--group-size", 32, "--algorithm", algorithm, "--device", "cpu"),
        *("--calibration", text, "--exclude", r"layers\.0\.mlp", "--resume", tmp_path / "state"),
    )
    assert status == 0
    assert "11 layers" in said
    found = low_bit(load(out))
    assert len(found) == 11
    assert not any("layers.0.mlp" in name for name in found)
    report = json.loads((out / "calibration.json").read_text())
    assert {layer["algorithm"] for layer in report["layers"]} == {algorithm}
    # The context of the model is 32 tokens: 15 windows of the text's 500.
    assert {layer["tokens"] for layer in report["layers"]} == {480}
    assert (tmp_path / "state" / "block-00001").is_dir()


@pytest.mark.parametrize("option", [("--group-size", 64), ("--scale-dtype", "float16")], ids=lambda option: option[0])
def test_int8_refuses_what_it_has_no_use_for(lq, folder, tmp_path, option):
    status, out, err = lq("quantize", folder, tmp_path / "out", "--scheme", "int8", "--device", "cpu", *option)
    assert (status, out) == (1, "")
    assert "--scheme int8 has one scale a row, in float32: leave out --group-size and --scale-dtype" in err
    assert not (tmp_path / "out").exists()


def test_options_of_calibration_are_named_where_there_is_none(lq, folder, tmp_path):
    common = ("quantize", folder, tmp_path, "--algorithm", "rtn", "--group-size", 32, "--device", "cpu")
    status, _, err = lq(*common, "--windows", 4, "--batch-size", 2, "--offload", "--resume", tmp_path / "state")
    assert status == 0
    assert "lq: --windows, --batch-size, --offload, --resume are not used: rtn needs no data" in err
    assert "lq: --window-length is not used: rtn" in lq(*common, "--window-length", 8)[2]


def test_a_folder_that_cannot_be_is_refused_before_the_work(lq, folder, tmp_path, monkeypatch):
    monkeypatch.setattr("lq_torch.cli_quantize.load_dense", lambda *_: pytest.fail("the model was loaded"))
    (tmp_path / "file").touch()
    for out in (tmp_path / "file", tmp_path / "file" / "out", tmp_path / ("x" * 300)):
        status, _, err = lq("quantize", folder, out, "--device", "cpu")
        assert status == 1
        assert "cannot write to" in err
        assert "name another folder to write" in err


@pytest.mark.parametrize("ggml_type", ["q4_0", "q5_1", "iq4_nl"])
def test_ggml_types(lq, folder, tmp_path, ggml_type):
    status, out, err = lq("quantize", folder, tmp_path, "--scheme", ggml_type, "--device", "cpu")
    assert (status, err) == (0, "")
    assert "14 layers of" in out
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    for name, weight in low_bit(load(tmp_path)).items():
        assert weight.ggml_type == ggml_type
        assert torch.equal(weight.blocks(), GGMLTensor.from_hp(model.get_parameter(name), ggml_type).blocks())
    assert not (tmp_path / "calibration.json").exists()


def test_a_text_is_an_importance_for_ggml_types_that_search(lq, folder, text, tmp_path):
    common = ("--scheme", "q4_0", "--device", "cpu")
    assert lq("quantize", folder, tmp_path / "plain", *common)[0] == 0
    status, said, err = lq(
        *("quantize", folder, tmp_path / "out", *common, "--calibration", text, "--windows", 10),
        *("--exclude", r"layers\.0\.mlp", "--resume", tmp_path / "state", "--batch-size", 4),
    )
    assert (status, err) == (0, "")
    assert "11 layers in" in said
    assert "in 4.500 bits each" in said
    report = json.loads((tmp_path / "out" / "calibration.json").read_text())["layers"]
    assert {(layer["algorithm"], layer["tokens"]) for layer in report} == {("imatrix", 320)}
    assert all(0 < layer["error"] < 0.05 for layer in report)
    assert (tmp_path / "state" / "block-00001").is_dir()
    plain, found = low_bit(load(tmp_path / "plain")), low_bit(load(tmp_path / "out"))
    assert len(found) == 11
    assert all(not torch.equal(weight.blocks(), plain[name].blocks()) for name, weight in found.items())


@pytest.mark.parametrize("algorithm", ["mse", "gptq"])
def test_bits_by_layer_within_a_budget(lq, folder, text, tmp_path, algorithm):
    status, out, err = lq(
        *("quantize", folder, tmp_path, "--target-bits", 4.5, "--algorithm", algorithm, "--calibration", text),
        *("--device", "cpu", "--exclude", "q_proj", "--resume", tmp_path / "state"),
    )
    assert (status, err) == (0, "")
    assert len(json.loads((tmp_path / "state" / "sensitivity.json").read_text())["layers"]) == 12
    found = low_bit(load(tmp_path)).values()
    assert len(found) == 12
    assert len({weight.packed_nbytes / weight.numel() for weight in found}) > 1
    assert 4.2 < 8 * sum(w.packed_nbytes for w in found) / sum(w.numel() for w in found) <= 4.5
    assert "12 layers of" in out
    chosen = [line for line in out.splitlines() if " bits, groups of " in line]
    assert len(chosen) == 12
    assert chosen[0].startswith("model.layers.0.self_attn.k_proj: ")


@pytest.mark.parametrize(("flag", "heads"), [("--rotate", 2), ("--rotate-stream", 0)])
def test_a_rotated_model_is_saved_untied(lq, folder, tmp_path, flag, heads):
    """8 bits of a rotated model, read back, predict what the model does: the rotation is nowhere left."""
    tied = tmp_path / "tied"
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.config.tie_word_embeddings = True
    model.tie_weights()
    model.model.norm.weight.data.copy_(torch.linspace(0.5, 2, 64))
    model.save_pretrained(tied)
    transformers.AutoTokenizer.from_pretrained(folder).save_pretrained(tied)
    status, out, err = lq("quantize", tied, tmp_path / "out", flag, "--scheme", "int8", "--device", "cpu")
    assert (status, err) == (0, "")
    assert "rotated a residual stream of 64" in out
    assert ("heads of 2 blocks" in out) == bool(heads)
    assert "the output head has a weight of its own" in out
    loaded = load(tmp_path / "out")
    assert not torch.equal(loaded.lm_head.weight, loaded.model.embed_tokens.weight)
    ids = torch.randint(len(WORDS), (4, 16), generator=torch.Generator().manual_seed(0))
    before, after = model(ids).logits.detach(), loaded(ids).logits.detach()
    assert (after - before).norm() < 0.05 * before.norm()


def test_a_model_that_cannot_be_rotated_is_left_alone(lq, folder, tmp_path):
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    config = transformers.Phi3Config(**{**model.config.to_dict(), "model_type": "phi3", "pad_token_id": 0})
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "phi3")
    transformers.AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path / "phi3")
    common = ("quantize", tmp_path / "phi3", tmp_path / "out", "--group-size", 32, "--device", "cpu")
    status, _, err = lq(*common, "--rotate")
    assert status == 1
    assert "lq: UnsupportedError: model.layers.0: no pair of layers" in err
    assert "--rotate-stream" in err
    assert not (tmp_path / "out").exists()
    assert lq(*common, "--rotate-stream")[0] == 0


def test_a_folder_of_another_checkpoint_is_refused_before_anything_is_read(lq, tmp_path):
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    status, _, err = lq("quantize", tmp_path / "missing", tmp_path, "--device", "cpu")
    assert status == 1
    assert "lq: SpecError" in err
    assert "name another folder" in err


def test_as_a_module(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        sys, "argv", ["lq", "quantize", str(folder), str(tmp_path), "--device", "cpu", "--group-size", "-1"]
    )
    runpy.run_module("lq_torch", run_name="__main__")
    assert "14 layers" in capsys.readouterr().out


def test_a_report_does_not_outlive_its_model(lq, folder, text, tmp_path):
    calibrated = ("--group-size", 32, "--algorithm", "gptq", "--calibration", text, "--window-length", 32)
    assert lq("quantize", folder, tmp_path, *calibrated)[0] == 0
    assert (tmp_path / "calibration.json").is_file()
    assert lq("quantize", folder, tmp_path, "--scheme", "int8")[0] == 0
    assert not (tmp_path / "calibration.json").exists()


def test_an_unused_text_is_said_to_be(lq, folder, text, tmp_path):
    status, _, err = lq("quantize", folder, tmp_path, "--group-size", 32, "--algorithm", "rtn", "--calibration", text)
    assert status == 0
    assert "--calibration is not used" in err
    status, _, err = lq("quantize", folder, tmp_path / "ggml", "--scheme", "q8_0", "--calibration", text)
    assert (status, err) == (0, "lq: --calibration is not used: q8_0 needs no data\n")
    status, _, err = lq("quantize", folder, tmp_path / "zero", "--scheme", "q8_0", "--batch-size", 0)
    assert (status, err) == (0, "lq: --batch-size is not used: q8_0 needs no data\n")


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (("--algorithm", "gptq"), "SpecError: --algorithm gptq needs --calibration"),
        (("--algorithm", "gptq", "--calibration", "/no/such/text"), "SpecError: cannot read the calibration text"),
        (("--algorithm", "gptq", "--calibration", "TEXT", "--windows", 99), "500 tokens, 15 windows of 32: expected"),
        (
            ("--algorithm", "gptq", "--calibration", "TEXT", "--window-length", 501),
            "SpecError: --window-length 501: the model reads at most 32 tokens",
        ),
        (
            ("--algorithm", "gptq", "--group-size", 32, "--calibration", "TEXT", "--windows", 2, "--resume", "TEXT"),
            "cannot be made a folder: File exists",
        ),
        (("--algorithm", "gptq", "--calibration", "TEXT", "--windows", 0), "SpecError: --windows 0"),
        (("--target-bits", 4.5), "SpecError: --target-bits needs --calibration"),
        (("--target-bits", 1.5, "--calibration", "TEXT"), "raise --target-bits"),
        (("--target-bits", 4.5, "--calibration", "TEXT", "--group-size", 32), "without --scheme and --group-size"),
        (("--scheme", "q4_0", "--algorithm", "gptq", "--calibration", "TEXT"), "SpecError: --scheme q4_0 fixes groups"),
        (("--scheme", "q8_0", "--group-size", 0), "SpecError: --scheme q8_0 fixes groups"),
        (("--scheme", "q4_k"), "ShapeError: model.layers.0.self_attn.q_proj: in_features=64"),
        (("--scheme", "q4_k", "--calibration", "TEXT"), "ShapeError: model.layers.0.self_attn.q_proj: in_features=64"),
        (("--scheme", "q4_0", "--calibration", "/no/such/text"), "SpecError: cannot read the calibration text"),
        (("--group-size", 48), "GroupSizeError: model.layers.0"),
        (("--group-size", 0), "GroupSizeError"),
        (("--exclude", "("), "SpecError: --exclude '('"),
        (("--exclude", "nothing"), "SpecError: --exclude 'nothing' matches none of 14 layers"),
        (("--device", "nowhere"), "SpecError: --device nowhere"),
        (("--scheme", "int8", "--algorithm", "gptq", "--calibration", "TEXT"), "SpecError: --scheme int8"),
    ],
    ids=lambda value: None if isinstance(value, str) else "-".join(map(str, value)),
)
def test_a_named_error_is_one_line_and_status_1(lq, folder, text, tmp_path, arguments, match):
    chosen = [text if argument == "TEXT" else argument for argument in arguments]
    status, out, err = lq("quantize", folder, tmp_path / "out", *chosen)
    assert status == 1
    assert err.startswith("lq: ")
    assert match in err
    assert err.count("\n") == 1
    assert out == ""
    assert not (tmp_path / "out").exists()


def test_models_that_are_none_are_named(lq, folder, tmp_path):
    out = tmp_path / "out"
    assert "there is no folder" in lq("quantize", "/no/such/folder", out)[2]
    assert "it has no config.json" in lq("quantize", tmp_path, out)[2]
    assert "is a GGUF file" in lq("quantize", tmp_path / "model.gguf", out)[2]
    assert "is the model itself" in lq("quantize", folder, folder)[2]
    assert "FormatError: cannot load the hub name" in lq("quantize", "x" * 300, out)[2]
    assert lq("quantize", folder, out, "--group-size", 32)[0] == 0
    assert "is quantized already" in lq("quantize", out, tmp_path / "again")[2]


def test_wrong_usage_has_status_2(lq, folder, tmp_path):
    assert lq("quantize", folder, tmp_path, "--algorithm", "magic")[0] == 2
    assert lq("quantize", folder)[0] == 2
    assert lq()[0] == 2
    for empty in (
        ("", tmp_path),
        (folder, ""),
        (folder, tmp_path, "--resume", ""),
        (folder, tmp_path, "--calibration", ""),
    ):
        status, _, err = lq("quantize", *empty)
        assert (status, err.endswith("is empty\n")) == (2, True)

"""``lq-eval ppl`` as a command: what it prints and records, and what it refuses."""

import copy
import json

import pytest
from lq_eval.data import eval_text_path, tiny_llama_path
from lq_eval.evaluate import quantized_copy
from lq_eval.results import read_records
from lq_eval.schemes import parse_scheme
from lq_torch import save_gguf, save_pretrained


@pytest.mark.parametrize("kl", [True, False], ids=["kl", "no-kl"])
def test_ppl_of_a_folder(lq_eval, tmp_path, kl):
    record = tmp_path / "ppl.jsonl"
    result = lq_eval(
        "ppl",
        tiny_llama_path(),
        *("--scheme", "int8,int4-g32", "--tokens", 512, "--seq-len", 128, "--batch-size", 2, "--device", "cpu"),
        *("--kl" if kl else "--no-kl", "--decode-tokens", 2, "--json", record),
        *(() if kl else ("--scale-dtype", "bfloat16")),
    )
    assert result.exit_code == 0, result.output
    (found,) = read_records(record)
    assert [row["scheme"] for row in found.rows] == ["float", "int8", "int4-g32"]
    assert [row["windows"] for row in found.rows] == [4, 4, 4]
    assert all(("kl" in row) == kl for row in found.rows[1:])
    assert found.rows[1]["change_percent"] < found.rows[2]["change_percent"]
    assert [row["scale_dtype"] for row in found.rows] == [None, None, "float32" if kl else "bfloat16"]


def test_ppl_of_a_folder_that_lq_saved(lq_eval, tiny, tmp_path):
    folder, record = tmp_path / "quantized", tmp_path / "ppl.jsonl"
    save_pretrained(quantized_copy(tiny.model, parse_scheme("int4-g64")), folder)
    common = ("--tokens", 512, "--device", "cpu", "--json", record)
    missing = lq_eval("ppl", folder, *common)
    assert missing.exit_code == 1
    assert "save it beside them with tokenizer.save_pretrained, or name the float model" in missing.stderr
    beside = lq_eval("ppl", folder, "--baseline", tiny_llama_path(), "--tokens", 256, "--device", "cpu")
    assert beside.exit_code == 0, beside.output
    tiny.tokenizer.save_pretrained(folder)
    for source in ((folder,), (tiny_llama_path(), "--scheme", "int4-g64")):
        result = lq_eval("ppl", *source, *common)
        assert result.exit_code == 0, result.output
    saved, quantized = read_records(record)
    assert [(row["scheme"], row["scale_dtype"]) for row in saved.rows] == [("as saved", None)]
    assert saved.rows[0]["perplexity"] == pytest.approx(quantized.rows[1]["perplexity"], rel=1e-5)
    assert saved.rows[0]["linear_bytes"] == quantized.rows[1]["linear_bytes"]


def test_ppl_of_a_gguf_file(lq_eval, tiny, tmp_path):
    """With the float model's tokenizer, as what save_gguf writes has none."""
    file, record = tmp_path / "model.gguf", tmp_path / "ppl.jsonl"
    save_gguf(quantized_copy(tiny.model, parse_scheme("q8_0")), file)
    common = ("--tokens", 512, "--device", "cpu", "--json", record)
    for arguments in ((file, "--baseline", tiny_llama_path()), (tiny_llama_path(), "--scheme", "q8_0")):
        result = lq_eval("ppl", *arguments, *common)
        assert result.exit_code == 0, result.output
    found, expected = (each.rows[1] for each in read_records(record))
    assert found["perplexity"] == pytest.approx(expected["perplexity"], rel=1e-5)
    assert found["linear_bytes"] == expected["linear_bytes"]
    assert "no tokenizer that can be read" in lq_eval("ppl", file, "--tokens", 256).stderr
    assert "there is no file" in lq_eval("ppl", tmp_path / "other.gguf", "--tokens", 256).stderr


@pytest.fixture
def saved(tmp_path):
    """A folder that is taken for one that lq saved; nothing of it is ever read."""
    folder = tmp_path / "saved"
    folder.mkdir()
    (folder / "lq.json").write_text("{}")
    return folder


@pytest.mark.parametrize(
    "option", [("--scheme", "int8"), ("--scale-dtype", "float16"), ("--no-kl",)], ids=lambda option: option[0]
)
def test_ppl_refuses_options_that_a_quantized_folder_would_ignore(lq_eval, saved, option):
    result = lq_eval("ppl", saved, *option)
    assert result.exit_code == 1
    assert f"SpecError: {option[0]} is for schemes" in result.stderr
    assert f"{str(saved)!r} is quantized already" in result.stderr
    if option[0] != "--scheme":
        beside = lq_eval("ppl", tiny_llama_path(), "--baseline", tiny_llama_path(), *option)
        assert beside.exit_code == 1
        assert "--baseline takes MODEL as it is" in beside.stderr


def test_ppl_refuses_a_quantized_baseline(lq_eval, saved):
    result = lq_eval("ppl", tiny_llama_path(), "--baseline", saved)
    assert result.exit_code == 1
    assert f"SpecError: --baseline {str(saved)!r} is quantized" in result.stderr


def test_ppl_refuses_a_baseline_of_another_vocabulary(lq_eval, tiny, tmp_path):
    """Fewer tokens, which the other model's are looked up in; and as many, but other ones."""
    fewer, other = tmp_path / "fewer", tmp_path / "other"
    for folder, tokens in ((fewer, 4000), (other, tiny.model.config.vocab_size)):
        config = copy.deepcopy(tiny.model.config)
        config.vocab_size, config.num_hidden_layers = tokens, 1
        type(tiny.model)(config).save_pretrained(folder)
        tiny.tokenizer.save_pretrained(folder)
    words = json.loads((other / "tokenizer.json").read_text(encoding="utf-8"))
    words["model"]["merges"] = words["model"]["merges"][:100]
    (other / "tokenizer.json").write_text(json.dumps(words), encoding="utf-8")
    for folder, reason in (
        (fewer, "knows 4096 tokens and its reference 4000"),
        (other, "cut the text into other tokens"),
    ):
        result = lq_eval("ppl", tiny_llama_path(), "--baseline", folder, "--tokens", 256, "--device", "cpu")
        assert result.exit_code == 1
        assert result.stderr.startswith("lq-eval: SpecError: ")
        assert reason in result.stderr


@pytest.fixture(scope="module")
def short(tiny, tmp_path_factory):
    """A random OPT of 128 positions: of more it has no embedding."""
    from transformers import OPTConfig, OPTForCausalLM

    folder = tmp_path_factory.mktemp("short")
    sizes = {"hidden_size": 64, "word_embed_proj_dim": 64, "ffn_dim": 128, "vocab_size": tiny.model.config.vocab_size}
    config = OPTConfig(num_hidden_layers=1, num_attention_heads=2, max_position_embeddings=128, **sizes)
    OPTForCausalLM(config).save_pretrained(folder)
    tiny.tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ((), "--seq-len 256: {} reads at most 128 tokens at once by its configuration; give --seq-len 128 or less"),
        (("--seq-len", 128, "--protocol", "windows-bos"), "--seq-len 128 and the BOS token of 'windows-bos': {} reads"),
        (("--seq-len", 128, "--decode-tokens", 64), "--decode-tokens 64, one more and a prompt of 64: {} reads"),
        (("--seq-len", 32, "--decode-tokens", 96), "--decode-tokens 96, one more and a prompt of 32: {} reads"),
    ],
    ids=["default", "bos", "decode", "short-prompt"],
)
def test_ppl_refuses_windows_that_a_model_was_not_made_for(lq_eval, short, options, reason):
    result = lq_eval("ppl", short, "--tokens", 256, "--device", "cpu", *options)
    assert result.exit_code == 1
    assert f"lq-eval: SpecError: {reason.format(f'the model {str(short)!r}')}" in result.stderr
    assert "Traceback" not in result.output


@pytest.mark.parametrize(
    "options",
    [
        ("--seq-len", 128),
        ("--seq-len", 127, "--protocol", "windows-bos"),
        ("--seq-len", 32, "--decode-tokens", 95),
    ],
    ids=["windows", "bos", "decode"],
)
def test_ppl_takes_windows_as_long_as_the_context(lq_eval, short, options):
    result = lq_eval("ppl", short, "--tokens", 256, "--device", "cpu", "--scheme", "int8", "--no-kl", *options)
    assert result.exit_code == 0, result.output


def test_ppl_refuses_windows_that_a_models_rotary_embeddings_or_its_baselines_do_not_reach(lq_eval, short):
    longer = ("--tokens", 1025, "--seq-len", 1025, "--device", "cpu")
    result = lq_eval("ppl", tiny_llama_path(), *longer)
    assert result.exit_code == 1
    assert f"--seq-len 1025: the model {str(tiny_llama_path())!r} reads at most 1024 tokens" in result.stderr
    result = lq_eval("ppl", tiny_llama_path(), "--baseline", short, "--tokens", 256, "--device", "cpu")
    assert result.exit_code == 1
    assert f"--seq-len 256: the model {str(short)!r} reads at most 128 tokens" in result.stderr


def test_ppl_prints_one_json_document_last(lq_eval, tiny, tmp_path):
    """The document of a saved folder beside its float model has the figures of the scheme that it was saved in."""
    folder, record = tmp_path / "quantized", tmp_path / "ppl.jsonl"
    save_pretrained(quantized_copy(tiny.model, parse_scheme("int4-g64-asym")), folder)
    tiny.tokenizer.save_pretrained(folder)
    common = ("--text", eval_text_path(), "--tokens", 512, "--device", "cpu")
    result = lq_eval("ppl", folder, *common, "--json", "--baseline", tiny_llama_path())
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout.strip().splitlines()[-1])
    assert lq_eval("ppl", tiny_llama_path(), *common, "--scheme", "int4-g64-asym", "--json", record).exit_code == 0
    (recorded,) = read_records(record)
    reference, quantized = recorded.rows
    assert found["perplexity"] == pytest.approx(quantized["perplexity"], rel=1e-5)
    assert found["baseline_perplexity"] == pytest.approx(reference["perplexity"], rel=1e-5)
    assert found["kl_divergence"] == pytest.approx(quantized["kl"], rel=1e-3)
    assert found["top1_agreement"] == pytest.approx(quantized["top1"], abs=0.01)
    assert found["bits_per_weight"] == quantized["bits_per_weight"]
    assert found["tokens_per_second"] > 0


def test_ppl_document_without_a_baseline_says_null(lq_eval, tmp_path):
    result = lq_eval(
        "ppl", tiny_llama_path(), "--tokens", 256, "--no-kl", "--scheme", "int8", "--device", "cpu", "--json"
    )
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout.strip().splitlines()[-1])
    assert found["scheme"] == "int8"
    assert found["baseline_perplexity"] > 15
    assert found["kl_divergence"] is None
    assert found["top1_agreement"] is None


def test_ppl_on_a_text_file_equals_ppl_on_the_bundled_text(lq_eval, tmp_path):
    record = tmp_path / "ppl.jsonl"
    common = (
        "ppl",
        tiny_llama_path(),
        "--scheme",
        "int8",
        "--tokens",
        256,
        "--no-kl",
        "--device",
        "cpu",
        "--json",
        record,
    )
    assert lq_eval(*common).exit_code == 0
    assert lq_eval(*common, "--text", eval_text_path()).exit_code == 0
    bundled, given = read_records(record)
    assert bundled.rows[0]["perplexity"] == given.rows[0]["perplexity"]


def test_ppl_on_a_local_wikitext2(lq_eval, tmp_path):
    (tmp_path / "wiki.test.raw").write_text(eval_text_path().read_text(encoding="utf-8")[:4000], encoding="utf-8")
    result = lq_eval(
        "ppl",
        tiny_llama_path(),
        *("--dataset", "wikitext2", "--dataset-dir", tmp_path, "--seq-len", 64, "--device", "cpu", "--scheme", "int8"),
    )
    assert result.exit_code == 0, result.output
    assert "wikitext2 (test)" in result.output


@pytest.mark.parametrize("tokens", [1, -1])
def test_ppl_refuses_steps_without_a_median_before_loading(lq_eval, monkeypatch, tokens):
    monkeypatch.setattr("lq_eval.models.load_model", None)
    result = lq_eval("ppl", tiny_llama_path(), "--decode-tokens", tokens)
    assert result.exit_code == 1
    assert result.stderr.startswith(f"lq-eval: SpecError: --decode-tokens {tokens}: expected at least 2")

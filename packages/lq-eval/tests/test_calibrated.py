"""What calibration is worth on trained weights: the bundled model, quantized by the lq command."""

import copy
import json

import pytest
import torch
from lq_eval.data import calibration_text_path, eval_text_path, tiny_llama_path
from lq_torch import rotate_
from lq_torch.cli import main
from transformers import AutoModelForCausalLM


def measure(lq_eval, folder):
    """Return the document of ``lq-eval ppl`` over 2048 tokens of the other text."""
    result = lq_eval(
        *("ppl", folder, "--text", eval_text_path(), "--tokens", 2048, "--device", "cpu"),
        *("--baseline", tiny_llama_path(), "--json"),
    )
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout.splitlines()[-1])


def test_calibrated_codes_are_far_nearer_to_the_float_model(lq_eval, tmp_path):
    """With an eighth of the customary calibration tokens; measured: a KL divergence of 0.043, and 0.083 without data."""
    common = ("--scheme", "int4", "--asymmetric", "--device", "cpu", "--dtype", "float32")
    text = ("--calibration", str(calibration_text_path()), "--windows", "16", "--window-length", "256")
    documents = {}
    for algorithm, data in (("gptq", text), ("mse", ())):
        folder = tmp_path / algorithm
        main(["quantize", str(tiny_llama_path()), str(folder), "--algorithm", algorithm, *common, *data])
        documents[algorithm] = measure(lq_eval, folder)
    found, reference = documents["gptq"], documents["mse"]
    assert found["bits_per_weight"] == reference["bits_per_weight"] == 4 + 2 * 32 / 128
    assert found["kl_divergence"] < 0.6 * reference["kl_divergence"]
    assert found["kl_divergence"] < 0.055
    assert found["baseline_perplexity"] < found["perplexity"] < reference["perplexity"]


# Measured over 4096 tokens: q4_0 0.076 and 0.059, q4_k 0.050 and 0.032.
@pytest.mark.exhaustive(where=lambda ggml_type: ggml_type == "q4_0")
@pytest.mark.parametrize(("ggml_type", "share"), [("q4_0", 0.9), ("q4_k", 0.8)], ids=["q4_0", "q4_k"])
def test_a_text_is_worth_as_much_to_ggml_types_as_an_imatrix(lq_eval, tmp_path, ggml_type, share):
    common = ("--scheme", ggml_type, "--device", "cpu", "--dtype", "float32")
    text = ("--calibration", str(calibration_text_path()), "--windows", "8", "--window-length", "256")
    documents = {}
    for name, data in (("weighted", text), ("plain", ())):
        folder = tmp_path / name
        main(["quantize", str(tiny_llama_path()), str(folder), *common, *data])
        documents[name] = measure(lq_eval, folder)
    assert documents["weighted"]["bits_per_weight"] == documents["plain"]["bits_per_weight"] == 4.5
    assert documents["weighted"]["kl_divergence"] < share * documents["plain"]["kl_divergence"]


@pytest.mark.exhaustive
def test_bits_by_layer_beat_uniform_bits_of_the_same_size(lq_eval, tmp_path):
    """Rounded without data, to be quick; measured on the whole text, 4.5 bits: a KL divergence of 0.040, and 0.069 uniform."""
    common = ("--device", "cpu", "--dtype", "float32", "--algorithm", "mse", "--scale-dtype", "bfloat16")
    text = ("--calibration", str(calibration_text_path()), "--windows", "3", "--window-length", "256")
    mixed = ("--target-bits", "4.5", *text)
    documents = {}
    for name, options in (("mixed", mixed), ("uniform", ("--group-size", "32"))):
        folder = tmp_path / name
        main(["quantize", str(tiny_llama_path()), str(folder), *common, *options])
        documents[name] = measure(lq_eval, folder)
    assert documents["mixed"]["bits_per_weight"] <= documents["uniform"]["bits_per_weight"] == 4.5
    assert documents["mixed"]["kl_divergence"] < 0.75 * documents["uniform"]["kl_divergence"]


@pytest.mark.parametrize("matrix", ["hadamard", "orthogonal"])
def test_rotated_weights_make_the_same_predictions(matrix):
    model = AutoModelForCausalLM.from_pretrained(tiny_llama_path(), dtype=torch.float32)
    rotated = copy.deepcopy(model)
    done = rotate_(rotated, matrix=matrix, untie=True)
    assert (done.width, len(done.heads), done.untied) == (256, 4, True)
    ids = torch.randint(4096, (2, 64), generator=torch.Generator().manual_seed(7))
    with torch.no_grad():
        before, after = model(ids).logits.double(), rotated(ids).logits.double()
    assert (after - before).norm() < 5e-6 * before.norm()

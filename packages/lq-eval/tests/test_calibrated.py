"""What calibration is worth on trained weights: the bundled model, quantized by the lq command."""

import json

from lq_eval.data import calibration_text_path, eval_text_path, tiny_llama_path
from lq_torch.cli import main


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

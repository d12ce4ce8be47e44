"""lq-eval: what low-bit weights cost in quality and gain in size and speed.

Perplexity by named protocols, KL divergence from the float model, error and size of every scheme, benchmarks; and the
``lq-eval`` command. Quantization itself is lq-torch's.
"""

from lq_eval.corpus import load_text, load_wikitext2, make_windows, tokenize
from lq_eval.data import calibration_text_path, eval_text_path, tiny_llama_path
from lq_eval.divergence import Comparison, Divergence, compare, kl_divergence
from lq_eval.errors import BenchError, ModelLoadError, TextTooShortError
from lq_eval.evaluate import (
    Evaluation,
    Settings,
    evaluate_in_turn,
    evaluate_one,
    evaluate_together,
    quantized_copy,
)
from lq_eval.models import LoadedModel, ModelSize, load_model, model_size
from lq_eval.perplexity import PROTOCOLS, Perplexity, Protocol, measure_perplexity
from lq_eval.results import Record, append_record, environment, read_records
from lq_eval.schemes import MatrixError, measure_matrix, parse_scheme, parse_schemes

__all__ = [
    "PROTOCOLS",
    "BenchError",
    "Comparison",
    "Divergence",
    "Evaluation",
    "LoadedModel",
    "MatrixError",
    "ModelLoadError",
    "ModelSize",
    "Perplexity",
    "Protocol",
    "Record",
    "Settings",
    "TextTooShortError",
    "append_record",
    "calibration_text_path",
    "compare",
    "environment",
    "eval_text_path",
    "evaluate_in_turn",
    "evaluate_one",
    "evaluate_together",
    "kl_divergence",
    "load_model",
    "load_text",
    "load_wikitext2",
    "make_windows",
    "measure_matrix",
    "measure_perplexity",
    "model_size",
    "parse_scheme",
    "parse_schemes",
    "quantized_copy",
    "read_records",
    "tiny_llama_path",
    "tokenize",
]

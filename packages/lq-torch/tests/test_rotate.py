"""Rotations: the matrices, what stays of a model's function (all of it), and models that cannot be rotated."""

import copy

import pytest
import torch
from lq_formats import NonFiniteError, SpecError, UnsupportedError
from lq_torch import Int4WeightOnlyConfig, quantize_, rotate_
from lq_torch.rotation import hadamard, random_rotation
from torch import nn

transformers = pytest.importorskip("transformers")

VOCABULARY = 61
COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}


def make(family="Llama", dtype=torch.float32, **changes):
    """A random model whose norms, biases and embeddings are not the neutral ones of an initialisation."""
    config = getattr(transformers, f"{family}Config")(**{**COMMON, **changes})
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    for name, value in model.named_parameters():
        if value.dim() == 1:
            value.data += 0.5 * torch.rand_like(value) if "norm" in name else torch.randn_like(value)
    return model


@pytest.fixture
def tokens():
    return torch.randint(1, VOCABULARY, (3, 24), generator=torch.Generator().manual_seed(3))


@torch.no_grad()
def change(model, reference, tokens):
    after, before = model(tokens).logits.double(), reference(tokens).logits.double()
    return float((after - before).norm() / before.norm())


def state(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def unchanged(model, before):
    after = model.state_dict()
    return after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)


@pytest.mark.parametrize("order", [1, 2, 4, 12, 20, 28, 36, 60, 64, 76, 80, 96, 104, 112, 320, 448, 768])
def test_rows_of_hadamard_matrices_are_orthogonal(order):
    matrix = hadamard(order)
    assert set(matrix.unique().tolist()) <= {-1.0, 1.0}
    rows = torch.randperm(order, generator=torch.Generator().manual_seed(0))[:64]
    products = matrix[rows].double() @ matrix.t()
    expected = torch.zeros_like(products)
    expected[torch.arange(len(rows)), rows] = order
    assert torch.equal(products, expected)


@pytest.mark.parametrize("order", [0, -4, 3, 6, 100, 52])
def test_orders_without_a_known_matrix_are_named(order):
    with pytest.raises(SpecError, match=str(order)):
        hadamard(order)
    with pytest.raises(SpecError, match="magic"):
        random_rotation(4, "magic")


@pytest.mark.parametrize(("matrix", "size"), [("hadamard", 48), ("orthogonal", 50)])
def test_rotations_are_orthogonal_and_told_by_their_seed(matrix, size):
    rotation = random_rotation(size, matrix, seed=1)
    torch.testing.assert_close(rotation @ rotation.t(), torch.eye(size).double(), rtol=0, atol=1e-13)
    assert torch.equal(rotation, random_rotation(size, matrix, seed=1))
    assert not torch.equal(rotation, random_rotation(size, matrix, seed=2))
    if matrix == "hadamard":
        torch.testing.assert_close(
            rotation.abs(), torch.full((size, size), size**-0.5, dtype=torch.float64), rtol=1e-14, atol=0
        )


def test_rotations_do_not_depend_on_the_number_of_threads_but_for_rounding():
    found = {}
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found[threads] = random_rotation(256, seed=3), random_rotation(300, "orthogonal", seed=3)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[1][0], found[2][0])
    torch.testing.assert_close(found[1][1], found[2][1], rtol=0, atol=1e-12)


@pytest.mark.parametrize("heads", [True, False], ids=["heads", "stream"])
@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("Llama", {}),
        ("Llama", {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 4}),
        ("Qwen2", {}),
        ("Qwen3", {"head_dim": 32}),
        ("Mistral", {"num_key_value_heads": 1}),
        ("Gemma", {"head_dim": 16}),
        ("Granite", {"residual_multiplier": 0.5, "embedding_multiplier": 3.0, "logits_scaling": 4.0}),
    ],
    ids=["llama", "llama-biases", "qwen2", "qwen3", "mistral-mqa", "gemma", "granite"],
)
def test_logits_stay(family, changes, heads, tokens):
    """Within rounding of float32, while every weight around the stream is another one."""
    model = make(family, **changes)
    rotated = copy.deepcopy(model)
    done = rotate_(rotated, heads=heads, untie=True)
    assert change(rotated, model, tokens) < 1e-5
    assert done.width == 64
    paths = [f"model.layers.{i}.self_attn" for i in (0, 1)]
    assert done.heads == (tuple((f"{path}.v_proj", f"{path}.o_proj") for path in paths) if heads else ())
    before = dict(model.named_parameters())
    for name, value in rotated.named_parameters():
        neutral = 0.0 if family == "Gemma" else 1.0
        if "norm" in name and value.shape == (64,):
            assert bool((value == neutral).all()), name
        elif value.dim() == 2:
            assert not torch.allclose(value, before[name], atol=1e-2), name


@pytest.mark.parametrize("matrix", ["hadamard", "orthogonal"])
def test_tied_embeddings_are_untied_on_demand(matrix, tokens):
    model = make(tie_word_embeddings=True)
    rotated = copy.deepcopy(model)
    with pytest.raises(UnsupportedError, match=r"lm_head\.weight is that of model\.embed_tokens .* untie=True"):
        rotate_(rotated, matrix=matrix)
    assert unchanged(rotated, state(model))
    assert rotate_(rotated, matrix=matrix, untie=True, seed=5).untied
    assert rotated.config.tie_word_embeddings is False
    rotated.tie_weights()
    assert rotated.lm_head.weight is not rotated.model.embed_tokens.weight
    assert change(rotated, model, tokens) < 1e-5


def test_large_channels_are_spread_over_all(tokens):
    """Embeddings with one channel 30 times the others, and the layers that read it: rounding costs less, rotated."""
    model = make()
    model.model.embed_tokens.weight.data[:, 5] *= 30
    rotated = copy.deepcopy(model)
    rotate_(rotated)

    def largest(weight):
        channels = weight.detach().square().mean(0)
        return float((channels.max() / channels.mean()).sqrt())

    assert largest(model.model.embed_tokens.weight) > 7
    assert largest(rotated.model.embed_tokens.weight) < 1.5
    nearest = [copy.deepcopy(model), rotated]
    for one in nearest:
        quantize_(one, Int4WeightOnlyConfig(group_size=32))
    assert change(nearest[1], model, tokens) < change(nearest[0], model, tokens)


def test_16_bit_weights_are_rounded_once(tokens):
    model = make(dtype=torch.bfloat16)
    wide = copy.deepcopy(model).float()
    rotate_(model)
    exact = copy.deepcopy(wide)
    rotate_(exact)
    for name, value in model.named_parameters():
        assert value.dtype is torch.bfloat16
        torch.testing.assert_close(value.float(), dict(exact.named_parameters())[name], rtol=2**-8, atol=1e-6)
    assert change(model.float(), wide, tokens) < 0.02


class Mixed(nn.Module):
    def __init__(self, bias):
        super().__init__()
        self.norm = nn.LayerNorm(64, bias=bias)
        self.mix = nn.Linear(64, 64)

    def forward(self, x):
        return x + self.mix(self.norm(x))


class LayerNorms(nn.Module):
    """A chain of blocks with a norm that subtracts the mean."""

    def __init__(self, bias):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(VOCABULARY, 64)
        self.blocks = nn.ModuleList(Mixed(bias) for _ in range(2))
        self.norm = nn.RMSNorm(64)
        self.lm_head = nn.Linear(64, VOCABULARY)

    def forward(self, ids):
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return self.lm_head(self.norm(x))


@pytest.mark.parametrize(
    ("model", "options", "match"),
    [
        (lambda: make("OPT", ffn_dim=96, word_embed_proj_dim=64), {}, "learned positions"),
        (lambda: make("GPTNeoX"), {}, "bias"),
        (lambda: make("Cohere"), {}, "CohereLayerNorm"),
        (lambda: make("Gemma2", head_dim=16), {"untie": True}, "post_attention_layernorm"),
        (lambda: make("Phi3"), {}, "heads=False"),
        (lambda: make(tie_word_embeddings=True), {}, "untie=True"),
        (lambda: make(hidden_size=72, num_attention_heads=4, head_dim=18), {}, "order 18"),
        (lambda: LayerNorms(bias=True), {"heads": False}, r"blocks\.0\.norm has a bias"),
        (lambda: LayerNorms(bias=False), {"heads": False}, r"blocks\.0\.norm \(LayerNorm\)"),
        (lambda: LayerNorms(bias=False), {}, "no config"),
        (lambda: nn.Sequential(nn.Embedding(8, 8), nn.Linear(8, 8)), {}, "ModuleList"),
    ],
    ids=[
        *("opt", "neox", "cohere", "gemma2", "phi3", "tied", "head-18", "layernorm-bias", "layernorm", "no-config"),
        "no-blocks",
    ],
)
def test_what_cannot_be_rotated_is_named_and_left_as_it_was(model, options, match):
    model = model()
    before = state(model)
    with pytest.raises((UnsupportedError, SpecError), match=match):
        rotate_(model, **options)
    assert unchanged(model, before)


class Narrow(nn.Module):
    """Runs in the dtypes that its kernel has."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        if x.dtype is torch.float64:
            raise RuntimeError("Expected mat_a to be Float32, got Double\nException raised from grouped_mm")
        return self.inner(x)


@pytest.mark.parametrize("name", ["mlp", "post_attention_layernorm"])
def test_a_block_that_does_not_run_in_float64_is_named_and_left_as_it_was(name):
    model = make()
    block = model.model.layers[1]
    setattr(block, name, Narrow(block.get_submodule(name)))
    before = state(model)
    reason = r"^model\.layers\.1: rotations are tried in float64, .*\(RuntimeError: Expected mat_a .*, got Double\); "
    with pytest.raises(UnsupportedError, match=reason) as caught:
        rotate_(model)
    assert "grouped_mm" not in str(caught.value)
    assert unchanged(model, before)


def test_a_block_that_fails_goes_back_to_its_device(monkeypatch):
    model = make()
    block, moves = model.model.layers[1], []
    block.mlp = Narrow(block.mlp)
    monkeypatch.setattr(block, "to", lambda device: moves.append(device.type))
    with pytest.raises(UnsupportedError):
        rotate_(model)
    assert moves == ["cpu", "cpu"]  # to where blocks are tried, and back


class NarrowNorm(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x):
        if x.dtype is torch.float64:
            raise NotImplementedError
        return nn.functional.rms_norm(x, self.weight.shape, self.weight)


def test_a_norm_that_does_not_run_in_float64_is_named():
    model = make()
    model.model.norm = NarrowNorm(64)
    before = state(model)
    with pytest.raises(
        UnsupportedError, match=r"^model\.norm: rotations are tried in float64, .*\(NotImplementedError\)"
    ):
        rotate_(model)
    assert unchanged(model, before)


def test_layers_in_one_and_odd_sizes_have_their_option(tokens):
    for model, options in (
        (make("Phi3"), {"heads": False}),
        (make(hidden_size=72, num_attention_heads=4, head_dim=18), {"matrix": "orthogonal"}),
    ):
        rotated = copy.deepcopy(model)
        rotate_(rotated, **options)
        assert change(rotated, model, tokens) < 1e-5


def test_quantized_and_broken_weights_are_named():
    model = make()
    quantize_(model, Int4WeightOnlyConfig(group_size=32))
    with pytest.raises(UnsupportedError, match=r"q_proj\.weight is a Int4Tensor"):
        rotate_(model)
    model = make()
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(NonFiniteError, match=r"layers\.1\.mlp\.up_proj"):
        rotate_(model)
    model = make()
    model.model.layers[1].mlp.up_proj.weight = model.model.layers[0].mlp.up_proj.weight
    with pytest.raises(UnsupportedError, match="shared with another module"):
        rotate_(model)


@pytest.mark.gpu
def test_a_model_on_a_gpu_stays_there(tokens):
    model = make().cuda()
    rotated = copy.deepcopy(model)
    rotate_(rotated)
    assert {value.device.type for value in rotated.parameters()} == {"cuda"}
    assert change(rotated, model, tokens.cuda()) < 1e-5

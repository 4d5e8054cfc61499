"""Models of transformers, unmodified, at tiny sizes: every parameter is covered, gradients are autograd's."""

import copy

import optree
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import grad

import lrkfac

pytestmark = [pytest.mark.peers, pytest.mark.slow]


class Logits(nn.Module):
    def __init__(self, body):
        super().__init__()
        self.body = body

    def forward(self, inputs):
        return self.body(inputs).logits


SMALL = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 12}
WORDS = {"vocab_size": 13, "max_position_embeddings": 8}


def gpt2(lib):
    sizes = {"vocab_size": 13, "n_positions": 8, "n_embd": 8, "n_layer": 2, "n_head": 2}
    config = lib.GPT2Config(**sizes, bos_token_id=0, eos_token_id=0, use_cache=False)
    return lib.GPT2LMHeadModel(config), torch.randint(13, (3, 5))


def bert(lib):
    config = lib.BertConfig(**SMALL, **WORDS, num_labels=3)
    return lib.BertForSequenceClassification(config), torch.randint(1, 13, (3, 5))


def llama(lib):
    config = lib.LlamaConfig(**SMALL, **WORDS, num_key_value_heads=1, use_cache=False)
    return lib.LlamaForCausalLM(config), torch.randint(3, 13, (3, 5))


def vit(lib):
    config = lib.ViTConfig(**SMALL, image_size=8, patch_size=4, num_labels=3)
    return lib.ViTForImageClassification(config), torch.randn(3, 3, 8, 8, dtype=torch.float64)


@pytest.mark.filterwarnings("ignore:There is a performance drop", "ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("make", [gpt2, bert, llama, vit], ids=lambda make: make.__name__)
@pytest.mark.parametrize("estimator", ["mc", "exact", "empirical"])
def test_every_parameter_is_covered_and_gradients_are_right(make, estimator):
    transformers = pytest.importorskip("transformers", reason="the extra 'peers' is not installed")
    body, inputs = make(transformers)
    model, params = lrkfac.from_module(Logits(body.double().eval()))
    params = optree.tree_map(lambda p: p + 0.1 * torch.randn_like(p), params)
    outputs = model(params, inputs)
    targets = torch.randint(outputs.shape[-1], outputs.shape[:-1])
    layers = lrkfac.find_layers(model, params, inputs, strict=True)
    e = lrkfac.evaluator(model, lrkfac.categorical(), layers, estimator)(params, inputs, targets)

    def loss(params):
        return F.cross_entropy(model(params, inputs).flatten(0, -2), targets.flatten())

    torch.testing.assert_close(e.loss, loss(params))
    leaves = zip(optree.tree_leaves(e.grads), optree.tree_leaves(grad(loss)(params)), strict=True)
    scale = max(g.abs().max() for g in optree.tree_leaves(e.grads))
    tolerance = 1e-6 if make is llama else 1e-10  # its RMSNorm computes in float32, whatever the parameters' dtype
    for parameter, (found, expected) in zip(layers.parameters, leaves, strict=True):
        assert (found - expected).abs().max() <= tolerance * scale, parameter.path
    tx = lrkfac.low_rank_kfac(layers, 0.05, rank=2)
    updates, _ = tx.update(e.grads, tx.init(params), params, evaluation=e)
    assert sum((u * g).sum() for u, g in zip(*map(optree.tree_leaves, (updates, e.grads)), strict=True)) < 0


class Text(nn.Module):
    def __init__(self, body, output):
        super().__init__()
        self.body, self.output = body, output

    def forward(self, **inputs):
        return self.body(**inputs)[self.output]


@pytest.mark.filterwarnings("ignore:There is a performance drop", "ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize(("make", "output"), [(gpt2, "logits"), (bert, "logits"), (bert, "pooler_output")])
@pytest.mark.parametrize("labelled", [False, True])
def test_batch_encodings_and_model_outputs(make, output, labelled):
    """The steps of a module that takes keywords and returns a tensor; the last batch smaller, a cache beside."""
    transformers = pytest.importorskip("transformers", reason="the extra 'peers' is not installed")
    body, ids = make(transformers)
    body.config.use_cache = make is gpt2
    net, plain = (copy.deepcopy(body.double().eval()) for _ in range(2))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    targets = torch.randint(3, ids.shape if make is gpt2 else (len(ids),))
    if output == "pooler_output":
        net, plain = net.bert, plain.bert
    elif labelled:
        batch["labels"] = targets
    options = {"lr": 0.05, "rank": 2, "statistics_every": 1}
    named = None if output == "logits" else output
    first = lrkfac.LowRankKFAC(net, lrkfac.categorical(), transformers.BatchEncoding(batch), output=named, **options)
    second = lrkfac.LowRankKFAC(Text(plain, output), lrkfac.categorical(), batch, **options)
    for n in (3, 3, 2):
        losses = []
        for optimizer, kind in ((first, transformers.BatchEncoding), (second, dict)):
            torch.manual_seed(n)
            losses.append(optimizer.step(kind({name: x[:n] for name, x in batch.items()}), targets[:n]))
        torch.testing.assert_close(*losses, rtol=1e-12, atol=0)
    optree.tree_map(torch.testing.assert_close, dict(net.named_parameters()), dict(plain.named_parameters()))

"""FreeModel around a Hugging Face model: oracle, routed and mixed, under inference_mode, with heads."""

import pytest
import torch
from checks import assert_same_bits
from hugging_face import import_transformers
from torch import nn

import fastmerge as fm
from fastmerge.experts import softmax_mixture, train

BertConfig, BertForSequenceClassification, _ = import_transformers()
TASKS = ["spam", "mood", "topic"]


def bert(seed):
    torch.manual_seed(seed)
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    return BertForSequenceClassification(BertConfig(vocab_size=90, max_position_embeddings=20, **shape)).eval()


@pytest.fixture(scope="module")
def served():
    base = bert(0)
    models = []
    for seed in (1, 2, 3):
        model = bert(seed)
        model.load_state_dict({k: base.state_dict()[k] + 0.1 * v for k, v in model.state_dict().items()})
        models.append(model)
    made = fm.free(base, models, tasks=TASKS, density=0.1, by="tensor", mu="balanced")
    g = torch.Generator().manual_seed(0)
    tokens = {t: torch.randint(30 * i, 30 * i + 30, (24, 12), generator=g) for i, t in enumerate(TASKS)}
    router = train(tokens, kind="tokens", epochs=15)
    return base, models, made, tokens, router


def routes(router):
    return lambda input_ids, attention_mask=None: router(input_ids)


@torch.inference_mode()
def test_batches_are_routed_sample_by_sample(served):
    _, _, made, tokens, router = served
    before = {k: v.clone() for k, v in made.backbone.state_dict().items()}
    free = made.serve(router=routes(router))
    x = torch.cat([t[:5] for t in tokens.values()])[torch.randperm(15, generator=torch.Generator().manual_seed(1))]
    chosen = free.route(input_ids=x)
    out = free(input_ids=x, attention_mask=torch.ones_like(x))
    assert type(out).__name__ == "SequenceClassifierOutput"
    assert set(chosen.tolist()) == {0, 1, 2}
    for i in range(len(x)):
        own = free.use(TASKS[chosen[i]])(
            input_ids=x[i : i + 1], attention_mask=torch.ones(1, 12), task=TASKS[chosen[i]]
        )
        torch.testing.assert_close(out.logits[i : i + 1], own.logits, rtol=1e-4, atol=1e-5)
    oracle = free(input_ids=x, task=[TASKS[i] for i in chosen])
    torch.testing.assert_close(oracle.logits, out.logits)
    free.use(None)
    for k, v in before.items():
        assert_same_bits(made.backbone.state_dict()[k], v, k)


@torch.inference_mode()
def test_softmax_mixture_is_the_weighted_sum_of_experts(served):
    _, _, made, tokens, router = served
    before = {k: v.clone() for k, v in made.backbone.state_dict().items()}
    free = made.serve()
    mixture = softmax_mixture(router, tokens["mood"], temperature=3.0)
    assert list(mixture) == TASKS
    assert 0 < mixture["spam"] < mixture["mood"] < 1
    free.use(mixture)
    for k in made.experts["spam"].tensors:
        want = before[k] + sum(w * made.experts[n].tensors[k].dense() for n, w in mixture.items())
        torch.testing.assert_close(made.backbone.state_dict()[k], want)
    free.use(None)
    for k, v in before.items():
        assert_same_bits(made.backbone.state_dict()[k], v, k)


@torch.inference_mode()
def test_heads_of_a_hugging_face_model(served):
    _, _, made, tokens, router = served
    heads = {t: nn.Linear(32, n) for t, n in zip(TASKS, (2, 5, 7), strict=True)}
    free = made.serve(heads=heads, head="classifier", router=routes(router))
    for task, n in zip(TASKS, (2, 5, 7), strict=True):
        assert free(input_ids=tokens[task], task=task).logits.shape == (24, n)
    x = torch.cat([t[:4] for t in tokens.values()])
    groups = {t: out.logits.shape[1] for t, _, out in free.groups(input_ids=x)}
    assert groups == {"spam": 2, "mood": 5, "topic": 7}
    free.use(None)
    assert made.backbone.classifier.out_features == 2

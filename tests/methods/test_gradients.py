"""Calibration gradients against plain autograd, and the module is left as it was."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastmerge.errors import BadInput
from fastmerge.gradients import Weights, gradient


class Net(nn.Module):
    def __init__(self, classes=3, dropout=0.0):
        super().__init__()
        self.embed = nn.Linear(6, 8)
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Dropout(dropout)) for _ in range(3)])
        self.norm = nn.BatchNorm1d(8)
        self.head = nn.Linear(8, classes)

    def forward(self, x):
        x = self.embed(x)
        for block in self.blocks:
            x = x + block(x)
        return self.head(self.norm(x))


def data(count=10, batch=4, seed=0, classes=3):
    g = torch.Generator().manual_seed(seed)
    x, y = torch.randn(count, 6, generator=g), torch.randint(0, classes, (count,), generator=g)
    return [(x[i : i + batch], y[i : i + batch]) for i in range(0, count, batch)]


def make(seed=0, **kwargs):
    torch.manual_seed(seed)
    return Net(**kwargs)


def plain(net, state, batches, loss):
    """Autograd over all items at once, in eval mode: mean loss and gradients."""
    net = copy.deepcopy(net)
    net.load_state_dict(state)
    net.eval()
    x, y = (torch.cat(parts) for parts in zip(*batches, strict=True))
    value = loss(net(x), y)
    value.backward()
    return float(value.detach()), {n: p.grad for n, p in net.named_parameters()}


def other_weights(net, seed=7):
    g = torch.Generator().manual_seed(seed)
    return {
        n: t + 0.1 * torch.randn(t.shape, generator=g) if t.is_floating_point() else t.clone()
        for n, t in net.state_dict().items()
        if not n.endswith("running_var")
    } | {"norm.running_var": torch.rand(8, generator=g) + 0.5}


def check(got, want, rtol=1e-4, atol=1e-6):
    assert got.keys() == want.keys()
    for n in want:
        torch.testing.assert_close(got[n], want[n], rtol=rtol, atol=atol, msg=lambda m, n=n: f"{n}: {m}")


@pytest.mark.parametrize("options", [{}, {"micro_batch": 1}, {"micro_batch": 3}, {"checkpointing": True}])
def test_mean_gradient_is_autograds(options):
    net, batches = make(), data()
    state = other_weights(net)
    before = {n: t.clone() for n, t in net.state_dict().items()}
    pointers = {n: p.data_ptr() for n, p in net.named_parameters()}
    net.head.weight.requires_grad_(False)
    g = gradient(net, "cross_entropy", batches, **options)
    value, want = plain(net, state, batches, F.cross_entropy)
    got = g(state)
    want["head.weight"] = got["head.weight"] if want["head.weight"] is None else want["head.weight"]
    check(got, want)
    assert g.value == pytest.approx(value, rel=1e-5)
    assert g.loss(state) == pytest.approx(value, rel=1e-5)
    # The module is as it was: values, storages, gradients, flags, mode.
    for n, t in net.state_dict().items():
        assert torch.equal(t, before[n])
    assert {n: p.data_ptr() for n, p in net.named_parameters()} == pointers
    assert all(p.grad is None for p in net.parameters())
    assert not net.head.weight.requires_grad
    assert net.training
    assert "forward" not in vars(net.blocks[0])


def test_sum_and_frozen_parameters():
    net, batches = make(), data()
    state = other_weights(net)
    _, want = plain(net, state, batches, lambda out, y: F.cross_entropy(out, y, reduction="sum"))
    check(gradient(net, "cross_entropy", batches, reduction="sum")(state), want)
    some = gradient(net, "cross_entropy", batches, reduction="sum", parameters=["head.bias"])(state)
    check(some, {"head.bias": want["head.bias"]})


def test_eval_mode_is_deterministic_and_train_mode_is_not():
    net, batches = make(dropout=0.5), data()
    state = net.state_dict()
    quiet, noisy = gradient(net, "cross_entropy", batches), gradient(net, "cross_entropy", batches, train_mode=True)
    name = "blocks.0.0.weight"
    assert torch.equal(quiet(state)[name], quiet(state)[name])
    assert not torch.equal(noisy(state)[name], noisy(state)[name])
    # Batch norm in train mode would update its statistics: they are put back.
    assert torch.equal(net.norm.running_mean, torch.zeros(8))
    assert int(net.norm.num_batches_tracked) == 0


def test_tasks_with_heads_of_their_own():
    nets = {"a": make(0, classes=3), "b": make(1, classes=5)}
    batches = {"a": data(8), "b": data(12, seed=1, classes=5)}
    state = {n: t for n, t in make(2).state_dict().items() if not n.startswith("head")}
    g = gradient(nets, "cross_entropy", batches)
    got = g(state)
    parts = []
    for task in nets:
        full = {**nets[task].state_dict(), **state}
        parts.append(plain(nets[task], full, batches[task], F.cross_entropy))
        check(g.task(task)(state), {n: x for n, x in parts[-1][1].items() if n in state})
    want = {n: (parts[0][1][n] + parts[1][1][n]) / 2 for n in parts[0][1] if n in state}
    check(got, want)
    assert g.value == pytest.approx((parts[0][0] + parts[1][0]) / 2, rel=1e-5)
    assert g.tasks == ("a", "b")
    assert g.items == 20


def test_what_is_not_merged_is_each_tasks_own():
    nets = {"a": make(0), "b": make(1)}
    batches = {"a": data(8), "b": data(12, seed=1)}
    state = make(2).state_dict()
    merged = [n for n in state if not n.startswith("head")]
    g = gradient(nets, "cross_entropy", batches)
    want = g({n: state[n] for n in merged})
    check(g(Weights(state, merged)), want)  # the heads of one shape are not taken from the state
    one = gradient(nets["a"], "cross_entropy", batches["a"])
    full = one(state)
    check(one(Weights(state, merged)), {n: t for n, t in full.items() if n in merged})  # the state's head judges here


def test_workers_share_the_batches():
    net = make(0)
    batches = {"a": [*data(8), *data(5, seed=1), *data(7, seed=2)], "b": data(4, seed=3)}
    before, state = torch.get_num_threads(), make(2).state_dict()
    want = gradient(net, "cross_entropy", batches)
    got = gradient(net, "cross_entropy", batches, workers=3)
    check(got(state), want(state))
    assert got.value == pytest.approx(want.value, rel=1e-6)
    assert got.loss(state) == pytest.approx(want.loss(state), rel=1e-6)
    check(got.task("a")(state), want.task("a")(state))
    for n, g in got(state).items():
        assert torch.equal(g, got(state)[n])  # whichever worker ends first
    assert torch.get_num_threads() == before
    for bad in (0, -1):
        with pytest.raises(BadInput, match="workers must be at least 1"):
            gradient(net, "cross_entropy", batches, workers=bad)


def test_losses():
    net, batches = make(), data(6, 6)
    x, y = batches[0]
    state = net.state_dict()
    net.eval()
    with torch.no_grad():
        p = net(x).softmax(-1)
    assert gradient(net, "entropy", [x]).loss(state) == pytest.approx(float(-(p * p.log()).sum(-1).mean()), rel=1e-5)
    target = torch.randn(6, 3, generator=torch.Generator().manual_seed(0))
    want = float(F.mse_loss(net(x), target).detach())
    assert gradient(net, "mse", [(x, target)]).loss(state) == pytest.approx(want, rel=1e-5)
    assert gradient(net, "cross_entropy", [(x, target)]).loss(state) == pytest.approx(want, rel=1e-5)  # regression
    own = gradient(net, lambda m, b: F.cross_entropy(m(b[0]), b[1]), batches, micro_batch=4)  # a scalar is a mean
    assert own.loss(state) == pytest.approx(float(F.cross_entropy(net(x), y).detach()), rel=1e-5)


class TinyLM(nn.Module):
    """Takes and returns what Hugging Face models do; embedding and head are tied."""

    class Out:
        def __init__(self, logits):
            self.logits = logits

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 4)
        self.head = nn.Linear(4, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, input_ids, attention_mask=None):
        return self.Out(self.head(self.embed(input_ids).cumsum(1)))


def test_language_model_loss_is_the_mean_over_items_of_the_mean_over_tokens():
    torch.manual_seed(0)
    net = TinyLM()
    ids = torch.randint(0, 11, (3, 6))
    labels = ids.clone()
    labels[0, :4] = -100
    labels[1, 5:] = -100
    g = gradient(net, "causal_lm", [{"input_ids": ids, "labels": labels}], micro_batch=2)
    logits = net(ids).logits
    each = [F.cross_entropy(logits[i, :-1], labels[i, 1:], ignore_index=-100) for i in range(3)]
    want = sum(each) / 3
    want.backward()
    expected = net.embed.weight.grad.clone()
    net.embed.weight.grad = None
    got = g(net.state_dict())
    assert g.value == pytest.approx(float(want.detach()), rel=1e-5)
    assert list(got) == ["embed.weight"]
    torch.testing.assert_close(got["embed.weight"], expected)
    assert g.aliases == {"head.weight": "embed.weight"}


@pytest.mark.parametrize("amp", [torch.bfloat16, torch.float16])
def test_autocast_is_near_float32(amp):
    net, batches = make(), data()
    state = net.state_dict()
    want, got = gradient(net, "cross_entropy", batches)(state), gradient(net, "cross_entropy", batches, amp=amp)(state)
    for n in want:
        assert F.cosine_similarity(got[n].flatten(), want[n].flatten(), 0) > 0.99
        assert got[n].dtype == torch.float32


def test_weights_are_lent_not_copied():
    net = make()
    state = {n: t.clone() for n, t in net.state_dict().items()}
    seen = []

    def loss(model, batch):
        seen.append(model.embed.weight.data_ptr())
        return F.cross_entropy(model(batch[0]), batch[1])

    gradient(net, loss, data())(state)
    assert set(seen) == {state["embed.weight"].data_ptr()}
    half = {n: t.bfloat16() if t.is_floating_point() else t for n, t in state.items()}
    got = gradient(net, "cross_entropy", data(), dtype=torch.float32)(half)
    assert got["embed.weight"].dtype == torch.float32


@pytest.mark.parametrize(
    ("args", "options", "match"),
    [
        (("cross_entrpy", data()), {}, "did you mean 'cross_entropy'"),
        (("cross_entropy", []), {}, "no calibration data"),
        (("cross_entropy", {}), {}, "batches is empty"),
        (("cross_entropy", data()), {"reduction": "max"}, "reduction must be"),
        (("cross_entropy", data()), {"micro_batch": 0}, "micro_batch must be"),
        (("cross_entropy", data()), {"amp": torch.float64}, "amp must be"),
        (({"x": "mse"}, {"a": data(), "b": data()}), {}, r"loss has tasks \['x'\]"),
    ],
)
def test_bad_arguments_are_named(args, options, match):
    with pytest.raises(BadInput, match=match):
        gradient(make(), *args, **options)


def test_bad_calls_are_named():
    net = make()
    with pytest.raises(BadInput, match="needs labels"):
        gradient(net, "cross_entropy", [torch.zeros(2, 6)])(net.state_dict())
    with pytest.raises(BadInput, match="no parameter of the names"):
        gradient(net, "cross_entropy", data())({"other": torch.zeros(1)})
    with pytest.raises(BadInput, match=r"'head.weight' has shape \[9, 8\]"):
        gradient(net, "cross_entropy", data())({"head.weight": torch.zeros(9, 8)})
    bad = {**net.state_dict(), "head.bias": torch.full((3,), float("nan"))}
    with pytest.raises(BadInput, match="is not finite"):
        gradient(net, "cross_entropy", data())(bad)
    assert not net.head.bias.isnan().any()

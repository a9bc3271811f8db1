import math

import pytest
import torch
from checks import assert_same_bits
from torch import nn

import fastmerge as fm
from fastmerge.errors import BadInput
from fastmerge.experts import Expert, FreeModel, Router, Sparse, evaluate, extract, save, softmax_mixture, train


def family(count=3, dtype=torch.float32):
    g = torch.Generator().manual_seed(0)
    shapes = {"attn.q.weight": (40, 300), "mlp.weight": (31, 130), "bias": (300,), "conv.weight": (8, 3, 5, 5), "s": ()}
    base = {k: (torch.randn(s, generator=g) * 0.1).to(dtype) for k, s in shapes.items()}
    models = [
        {k: (v.float() + torch.randn(v.shape, generator=g) * 0.01 * (i + 1)).to(dtype) for k, v in base.items()}
        for i in range(count)
    ]
    return base, models


def top(delta, density, by):
    """What is kept, from the definition: stable sort of magnitudes, rows or whole, at least one."""
    rows = by == "row" and delta.ndim >= 2 and int(delta.shape[-1] * density) >= 1
    x = delta.reshape(-1, delta.shape[-1]) if rows else delta.reshape(1, -1)
    k = max(1, int(x.shape[1] * density))
    mask = torch.zeros_like(x, dtype=torch.bool)
    mask.scatter_(1, x.abs().sort(dim=1, descending=True, stable=True).indices[:, :k], True)
    return mask.view(delta.shape)


@pytest.mark.parametrize("by", ["row", "tensor"])
@pytest.mark.parametrize("scope", ["model", "tensor"])
def test_paper_experts(by, scope):
    base, models = family()
    d = 0.02
    experts = extract(base, models, density=d, by=by, scope=scope, cutoff=0.1)
    assert [e.task for e in experts] == ["task1", "task2", "task3"]
    deltas = [{k: m[k] - base[k] for k in base} for m in models]
    matrices = [k for k in base if base[k].ndim == 2]
    for i, e in enumerate(experts):
        for k in base:
            keep = top(deltas[i][k], d, by)
            s = e.tensors[k]
            assert torch.equal(s.index, keep.reshape(-1).nonzero().squeeze(1)), k
            assert_same_bits(s.value, deltas[i][k][keep], k)
            names = matrices if scope == "model" else [k]
            means = [float(torch.cat([x[n].reshape(-1) for n in names]).abs().double().mean()) for x in deltas]
            kept = torch.cat([deltas[i][n][top(deltas[i][n], d, by)] for n in names]).abs().double().mean()
            mu = -float(kept) * math.log(d) / (means[i] / sum(means) * means[i])
            assert s.mu == pytest.approx(mu, rel=1e-5), k


def test_vit_and_constant_mu():
    base, models = family(2)
    d = 0.05
    for e, m in zip(extract(base, models, density=d, mu="vit", cutoff=0.2), models, strict=True):
        delta = {k: m[k] - base[k] for k in base}
        filtered = {k: fm.ops.highpass_filter(v, 0.2) if v.ndim == 2 else v for k, v in delta.items()}
        t = sum(v.abs().mean().item() for v in filtered.values()) / len(base)
        kept = sum((v * top(v, d, "row")).abs().mean().item() for v in delta.values()) / len(base)
        assert e.tensors["mlp.weight"].mu == pytest.approx(-(kept / d) * math.log10(d) / t, rel=1e-5)
    assert {t.mu for t in extract(base, models, mu="constant", constant=3.0)[0].tensors.values()} == {3.0}


def test_zero_deltas_and_short_rows():
    base, models = family(2)
    zero, other = extract(base, [base, models[0]], density=0.01)
    assert all(t.mu == 0.0 and t.index.numel() == 0 for t in zero.tensors.values())
    # Rows of 5 would keep a fifth each: 600 elements keep int(6.0) in all instead; a scalar keeps itself.
    assert other.tensors["conv.weight"].index.numel() == 6
    assert other.tensors["s"].index.numel() == 1
    assert all(math.isfinite(t.mu) for t in other.tensors.values())


@pytest.mark.parametrize(
    ("kwargs", "match"),
    [
        ({"density": 0.0}, "density"),
        ({"mu": "log"}, "mu must be one of"),
        ({"cutof": 0.1}, "cutof"),
        ({"tasks": ["a", "a"]}, "different task names"),
        ({"tasks": ["a", "../b"]}, "file name"),
    ],
)
def test_bad_arguments_are_named(kwargs, match):
    base, models = family(2)
    with pytest.raises(BadInput, match=match):
        extract(base, models, **kwargs)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Linear(6, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        return {"logits": self.head(torch.relu(self.body(x))), "size": x.shape[1]}


@pytest.fixture
def served():
    torch.manual_seed(0)
    base = Net()
    models = []
    for i in range(3):
        m = Net()
        m.load_state_dict({k: v + 0.1 * (i + 1) * torch.randn_like(v) for k, v in base.state_dict().items()})
        models.append(m)
    backbone = fm.merge("fr", base, models)
    experts = extract(base, models, tasks=["a", "b", "c"], density=0.2, mu="constant", constant=1.0, by="tensor")
    return base, backbone, experts


def bits(module):
    return {k: v.clone() for k, v in module.state_dict().items()}


@pytest.mark.parametrize("combine", ["add", "override"])
def test_swapping_is_exact_and_undone_exactly(served, combine):
    base, backbone, experts = served
    before = bits(backbone)
    free = FreeModel(backbone, experts, combine=combine, base=base)
    for task in ("a", "b", "a", "c"):
        free.use(task)
        e = experts["abc".index(task)]
        for name, t in e.tensors.items():
            want = before[name].clone().view(-1)
            origin = before if combine == "add" else base.state_dict()
            want[t.index] = origin[name].view(-1)[t.index] + t.value * t.mu
            assert_same_bits(free.model.state_dict()[name], want.view(t.shape), f"{task} {name}")
    free.use(None)
    for name, v in before.items():
        assert_same_bits(backbone.state_dict()[name], v, name)


def test_mixture_and_inference_mode(served):
    _, backbone, experts = served
    before = bits(backbone)
    with torch.inference_mode(), FreeModel(backbone, experts).using({"a": 0.25, "b": 0.75}) as free:
        assert free.task is None
        for name in before:
            want = before[name] + sum(w * e.tensors[name].dense() for w, e in zip((0.25, 0.75), experts, strict=False))
            torch.testing.assert_close(backbone.state_dict()[name], want)
    for name, v in before.items():
        assert_same_bits(backbone.state_dict()[name], v, name)


def test_routing_groups_samples(served, tmp_path):
    _, backbone, experts = served
    for e in experts:
        save(e, tmp_path / f"{e.task}.safetensors")
    x = torch.randn(11, 6)
    choice = torch.tensor([2, 0, 0, 1, 2, 2, 0, 1, 1, 0, 2])
    free = FreeModel(backbone, tmp_path, router=lambda x: nn.functional.one_hot(choice, 3).float()).eval()
    with torch.no_grad():
        routed = free(x)
        oracle = free(x, task=["abc"[i] for i in choice])
        for i in range(11):
            one = free(x[i : i + 1], task="abc"[choice[i]])
            torch.testing.assert_close(routed["logits"][i : i + 1], one["logits"])
        assert_same_bits(routed["logits"], oracle["logits"])
        assert routed["size"] == 6
        assert [(t, len(i)) for t, i, _ in free.groups(x)] == [("a", 4), ("b", 3), ("c", 4)]


def test_a_router_names_its_tasks_in_its_own_order(served):
    _, backbone, experts = served
    x = torch.cat([torch.randn(5, 6) + 9, torch.randn(4, 6) - 9, torch.randn(3, 6)])
    router = train({"c": x[:5], "a": x[5:9], "b": x[9:]}, epochs=40)
    free = FreeModel(backbone, experts, router=router)
    assert [free.tasks[i] for i in free.route(x)] == ["c"] * 5 + ["a"] * 4 + ["b"] * 3
    assert [(t, len(i)) for t, i, _ in free.groups(x)] == [("a", 4), ("b", 3), ("c", 5)]
    with pytest.raises(BadInput, match="picks 'c', for which there is no expert"):
        FreeModel(backbone, experts[:2], router=router)


def test_heads_follow_the_task(served):
    _, backbone, experts = served
    heads = {"a": nn.Linear(8, 2), "b": nn.Linear(8, 5)}
    own = backbone.head
    free = FreeModel(backbone, experts, heads=heads, head="head")
    x = torch.randn(4, 6)
    assert free(x, task="a")["logits"].shape == (4, 2)
    assert free(x, task="b")["logits"].shape == (4, 5)
    assert free(x, task="c")["logits"].shape == (4, 3)
    with pytest.raises(BadInput, match="do not stack"):
        free(x, task=["a", "b", "a", "b"])
    free.use(None)
    assert free.model.head is own


def test_misuse_is_named(served):
    base, backbone, experts = served
    with pytest.raises(BadInput, match="no expert for task 'd'"):
        FreeModel(backbone, experts).use("d")
    with pytest.raises(BadInput, match="base"):
        FreeModel(backbone, experts, combine="override")
    with pytest.raises(BadInput, match="no router"):
        FreeModel(backbone, experts).route(torch.zeros(1, 6))
    with pytest.raises(BadInput, match="mixture"):
        FreeModel(backbone, experts, combine="override", base=base).use({"a": 0.5, "b": 0.5})
    wrong = Expert("x", {"nowhere": Sparse((2,), torch.tensor([0]), torch.ones(1))})
    with pytest.raises(BadInput, match="'nowhere'"):
        FreeModel(backbone, [wrong])


def images(seed, n=60):
    g = torch.Generator().manual_seed(seed)
    noise = torch.rand(n, 12, 12, generator=g)
    ramp = torch.linspace(0, 1, 12).expand(12, 12)
    return {"noise": noise, "ramp": 0.3 * noise + 0.7 * ramp, "column": 0.3 * noise + 0.7 * ramp.T}


def test_router_learns_saves_and_loads(tmp_path):
    router = train(images(0), kind="image", epochs=20)
    again = train(images(0), kind="image", epochs=20)
    result = evaluate(router, images(1))
    assert result.accuracy >= 0.95
    assert sum(map(sum, result.confusion)) == 180
    router.save(tmp_path / "r")
    loaded = Router.load(tmp_path / "r")
    x = images(2)["ramp"]
    assert_same_bits(loaded(x), router(x))
    assert_same_bits(again(x), router(x), "training is seeded")
    mixture = softmax_mixture(router, x)
    assert sum(mixture.values()) == pytest.approx(1.0)
    assert max(mixture, key=mixture.get) == "ramp"


def test_router_on_tokens_and_hidden_states():
    g = torch.Generator().manual_seed(0)
    tokens = {t: torch.randint(100 * i, 100 * i + 120, (50, 30), generator=g) for i, t in enumerate("abc")}
    assert evaluate(train(tokens, kind="tokens", epochs=15), tokens).accuracy >= 0.98
    hidden = {t: torch.randn(50, 7, 16, generator=g) + i for i, t in enumerate("ab")}
    assert evaluate(train(hidden, epochs=15), hidden).accuracy >= 0.98


def test_router_misuse_is_named(tmp_path):
    with pytest.raises(BadInput, match="at least two tasks"):
        train({"a": torch.zeros(3, 4)})
    with pytest.raises(BadInput, match="different numbers of features"):
        train({"a": torch.zeros(3, 4), "b": torch.zeros(3, 5)})
    with pytest.raises(BadInput, match=r"(?s)router.json can not be read.*what to do: check the path"):
        Router.load(tmp_path)
    train({"a": torch.zeros(3, 4), "b": torch.ones(3, 4)}, epochs=1).save(tmp_path)
    weights = (tmp_path / "router.safetensors").read_bytes()
    (tmp_path / "router.safetensors").write_bytes(weights[:-4])
    with pytest.raises(BadInput, match="the router can not be read"):
        Router.load(tmp_path)
    (tmp_path / "router.json").write_text("[]")
    with pytest.raises(BadInput, match=r"router\.json is not a JSON object"):
        Router.load(tmp_path)

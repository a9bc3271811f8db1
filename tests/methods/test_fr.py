"""fr against the published procedures, written here as plainly as their formulas read."""

import importlib
import math

import pytest
import torch
from checks import assert_close, assert_same_bits

import fastmerge as fm
from fastmerge.errors import BadInput
from fastmerge.methods._fr_rules import Rule
from fastmerge.methods.fr import coefficients

job_module, fr_module = (importlib.import_module(f"fastmerge.{n}") for n in ("job", "methods.fr"))

SHAPES = {
    "attn.in_proj_weight": (48, 16),
    "attn.in_proj_bias": (48,),
    "mlp.c_fc.weight": (61, 17),
    "encoder.attention.query.weight": (30, 30),
    "encoder.attention.query.bias": (30,),
    "intermediate.dense.weight": (101, 12),
    "embed.weight": (211, 24),
    "classifier.weight": (10, 24),
    "conv.weight": (4, 3, 5, 5),
    "norm.weight": (24,),
    "logit_scale": (),
    "tiny.weight": (5, 7),
}


def family(count=3, dtype=torch.float32, seed=0, size=1e-2):
    g = torch.Generator().manual_seed(seed)
    base = {k: (torch.randn(s, generator=g) * 0.1).to(dtype) for k, s in SHAPES.items()}
    models = [
        {k: (v.float() + torch.randn(v.shape, generator=g) * size * (i + 1)).to(dtype) for k, v in base.items()}
        for i in range(count)
    ]
    return base, models


def radial(v, cutoff):
    fy, fx = (2 * torch.fft.fftfreq(n, dtype=torch.float64) for n in v.shape)
    keep = torch.sqrt(fy[:, None] ** 2 + fx[None] ** 2) >= cutoff
    return torch.fft.ifft2(torch.fft.fft2(v.double()) * keep).real


def published(v, ratio, side=min):
    """The released code's filter: two masks around (H // 2, W // 2) of an unshifted spectrum, added."""
    height, width = v.shape
    y, x = torch.arange(height), torch.arange(width)
    d = torch.sqrt(((x - width // 2)[None] ** 2 + (y - height // 2)[:, None] ** 2).float())
    r0, radius = min(height, width) // 10, ratio * side(height, width)
    spectrum = torch.fft.fft2(v.double())
    low, band = spectrum * (d <= r0), spectrum * ((d >= r0) & (d <= radius))
    return (torch.fft.ifft2(low) + torch.fft.ifft2(band)).real


def close(got, want, what=""):
    assert_close(got, want.to(got.dtype), "fft", what)


@pytest.mark.parametrize("scope", ["model", "tensor"])
@pytest.mark.parametrize("policy", ["mean", "constant", "align"])
def test_paper_mode(policy, scope):
    base, models = family()
    deltas = [{k: (m[k] - base[k]).double() for k in base} for m in models]
    merged = fm.merge("fr", base, models, lambda_=0.8, lambda_policy=policy, scope=scope, cutoff=0.3)
    for k, v in base.items():
        flat = [torch.cat([d[n].reshape(-1) for n in base if base[n].ndim == 2]) for d in deltas]
        e = [x.abs().mean() for x in (flat if scope == "model" else [d[k] for d in deltas])]
        share = {"mean": [x / sum(e) for x in e], "constant": [1.0] * 3, "align": [max(e) / x for x in e]}[policy]
        g = [radial(d[k], 0.3) if v.ndim == 2 else d[k] for d in deltas]
        want = sum(0.8 * s * x for s, x in zip(share, g, strict=True))
        assert (merged[k].double() - (v.double() + want)).abs().max() <= 1e-6 * v.abs().max() + 1e-9, k


def test_defaults_are_the_papers():
    base, models = family(2)
    a = fm.merge("fr", base, models)
    b = fm.merge(
        "fr", base, models, lambda_=1.0, lambda_policy="mean", scope="model", mask="radial", cutoff=0.1, select=""
    )
    for k in base:
        assert_same_bits(a[k], b[k], k)


def test_per_model_lambda_and_select():
    base, models = family(2)
    merged = fm.merge("fr", base, models, lambda_policy="constant", lambda_=[0.5, -0.25], select="attn|mlp")
    for k, v in base.items():
        d = 0.5 * (models[0][k] - v).double() - 0.25 * (models[1][k] - v).double()
        want = radial(d, 0.1) if v.ndim == 2 and ("attn" in k or "mlp" in k) else d
        assert (merged[k].double() - v.double() - want).abs().max() <= 1e-7, k


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes_round_once(dtype):
    base, models = family(2, dtype)
    wide = {k: v.double() for k, v in base.items()}, [{k: v.double() for k, v in m.items()} for m in models]
    want = fm.merge("fr", *wide, lambda_policy="constant", lambda_=0.4)
    got = fm.merge("fr", base, models, lambda_policy="constant", lambda_=0.4)
    for k in base:
        assert got[k].dtype == dtype
        if dtype == torch.float64:
            close(got[k], want[k], k)
        else:  # the float32 result before rounding may lie on the other side of a rounding boundary, rarely
            differ = got[k] != want[k].to(dtype)
            assert differ.float().mean() <= 0.02
            close(got[k], want[k], k)


def test_vit8_preset():
    base, models = family()
    merged = fm.merge("fr", base, models, preset="vit8")
    bugs = fm.merge("fr", base, models, preset="vit8", reference_bugs=True)
    for k, v in base.items():
        deltas = [(m[k] - v).double() for m in models]
        if "attn" not in k and "mlp" not in k:
            assert_same_bits(merged[k], v, k)
            assert_same_bits(bugs[k], v, k)
            continue
        g = [published(d, 0.7) if "weight" in k else d for d in deltas]
        a = [x.abs().mean() for x in g]
        aligned = [x * (max(a) / e) for x, e in zip(g, a, strict=True)]
        assert (merged[k].double() - v.double() - 0.7 * sum(aligned)).abs().max() <= 1e-6, k
        first_only = sum(aligned) if "weight" in k else aligned[0]  # the first model's biases
        assert (bugs[k].double() - v.double() - 0.7 * first_only).abs().max() <= 1e-6, k


@pytest.mark.parametrize(
    ("preset", "ratio", "side", "factor", "filtered", "summed"),
    [
        (
            "vit30", 0.7, min, 0.15,
            lambda k: "weight" in k and any(w in k for w in ("attention", "output", "intermediate")),
            lambda k: any(w in k for w in ("attention", "output", "intermediate")),
        ),
        ("roberta", 0.7, min, 0.5, lambda k: "weight" in k and "classifier" not in k, lambda k: False),
        ("lm", 0.6, max, 0.4, lambda k: "weight" in k, lambda k: "bias" not in k and "classifier" not in k),
    ],
)  # fmt: skip
def test_sum_presets(preset, ratio, side, factor, filtered, summed):
    base, models = family(4)
    merged = fm.merge("fr", base, models, preset=preset)
    for k, v in base.items():
        deltas = [(m[k] - v).double() for m in models]
        if v.ndim == 2 and filtered(k) and (preset != "lm" or summed(k)):
            want = factor * sum(published(d, ratio, side) for d in deltas)
        elif summed(k):
            want = factor * sum(deltas)
        else:
            assert_same_bits(merged[k], v, k)
            continue
        assert (merged[k].double() - v.double() - want).abs().max() <= 1e-6, k


@pytest.mark.parametrize("bugs", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_llm_preset(dtype, bugs):
    base, models = family(3, dtype)
    merged = fm.merge("fr", base, models, preset="llm", reference_bugs=bugs)
    storage = dtype if bugs else torch.float32
    for k, v in base.items():
        deltas = []
        for m in models:
            d = m[k].to(storage) - v.to(storage)
            deltas.append(0.8 * (published(d, 0.9).to(storage) if v.ndim == 2 else d))
        u = torch.stack(deltas)
        sign = torch.where(u.sum(0) >= 0, 1, -1)
        want = v.to(storage) + 1.1 * (u * (u.sign() == sign)).sum(0)
        # A sum within rounding of zero may elect the other sign: those elements apart, one unit in the last place.
        clear = u.double().sum(0).abs() > 1e-6 if storage == torch.float32 else u.double().sum(0).abs() > 1e-4
        error = (merged[k].double() - want.double()).abs()[clear]
        ulp = 1e-6 if dtype == torch.float32 else 2**-10 * v.abs().max().item() + 3e-5
        assert error.numel() == 0 or error.max() <= ulp, k
        assert clear.float().mean() > 0.9


@pytest.mark.parametrize("preset", ["vit8", "vit30", "roberta", "lm", "llm"])
def test_presets_in_bfloat16_are_the_float32_result_rounded_once(preset):
    """Odd, tall, prime, small and 1-D tensors of every preset; the arithmetic is float32 whatever the storage."""
    base, models = family(3, torch.bfloat16)
    wide = {k: v.float() for k, v in base.items()}, [{k: v.float() for k, v in m.items()} for m in models]
    got, want = fm.merge("fr", base, models, preset=preset), fm.merge("fr", *wide, preset=preset)
    for k in base:
        assert_same_bits(got[k], want[k].bfloat16(), k)


def test_presets_can_be_overridden():
    base, models = family(2)
    k = "encoder.attention.query.weight"
    merged = fm.merge("fr", base, models, preset="vit30", mask="radial", lambda_=0.3, cutoff=0.4)
    want = 0.3 * sum(radial((m[k] - base[k]).double(), 0.4) for m in models)
    assert (merged[k].double() - base[k].double() - want).abs().max() <= 1e-7
    assert_same_bits(merged["norm.weight"], base["norm.weight"])


def test_zero_deltas_never_give_nan():
    base, models = family(2)
    for same in ([base, base], [base, models[0]]):
        for kwargs in ({}, {"lambda_policy": "align"}, {"scope": "tensor"}, {"preset": "vit8"}, {"preset": "llm"}):
            merged = fm.merge("fr", base, same, **kwargs)
            assert all(v.isfinite().all() for v in merged.values())
    assert_same_bits(fm.merge("fr", base, [base, base])["embed.weight"], base["embed.weight"])
    # The published alignment divides by zero, and says so only on request.
    wrong = fm.merge("fr", base, [base, models[0]], preset="vit8", reference_bugs=True)
    assert wrong["mlp.c_fc.weight"].isnan().all()


def test_coefficients():
    rule = Rule()
    assert coefficients(rule, [2.0, 2.0], [1.0, 3.0], 2) == [0.5, 1.5]
    assert coefficients(rule, [1.0, 1.0], [0.0, 0.0], 2) == [0.5, 0.5]
    assert coefficients(rule, [1.0] * 4, None, 4) == [0.25] * 4
    assert coefficients(Rule(policy="align"), [1.0, 1.0, 0.5], [1.0, 0.0, 4.0], 3) == [4.0, 0.0, 0.5]
    assert coefficients(Rule(policy="constant"), [0.3, 0.4], None, 2) == [0.3, 0.4]


def test_files_and_memory_give_the_same_bits(tmp_path):
    from safetensors.torch import load_file, save_file

    base, models = family(3, torch.bfloat16)
    base["wide.weight"] = torch.randn(700, 900).bfloat16()  # longer than one chunk
    for m in models:
        m["wide.weight"] = (base["wide.weight"].float() + torch.randn(700, 900) * 1e-2).bfloat16()
    for name, state in zip(["base", "a", "b", "c"], [base, *models], strict=True):
        (tmp_path / name).mkdir()
        save_file(state, tmp_path / name / "model.safetensors")
        (tmp_path / name / "config.json").write_text("{}")
    paths = [str(tmp_path / n) for n in "abc"]
    for i, kwargs in enumerate(({}, {"scope": "tensor", "lambda_policy": "align"}, {"preset": "llm"})):
        fm.merge("fr", str(tmp_path / "base"), paths, out=str(tmp_path / f"out{i}"), **kwargs)
        want = fm.merge("fr", base, models, **kwargs)
        got = load_file(tmp_path / f"out{i}" / "model.safetensors")
        for k in base:
            assert_same_bits(got[k], want[k], k)


ODD = {
    "tall": (301, 64),
    "prime.rows": (263, 48),
    "prime.columns": (40, 526),
    "odd": (57, 131),
    "wide": (20, 222),
    "b": (33,),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    "kwargs", [{}, {"mask": "disc_min", "ring_double": True, "lambda_policy": "constant"}], ids=str
)
def test_streaming_gives_the_bits_of_whole_tensors(tmp_path, monkeypatch, dtype, kwargs):
    """Files in chunks of any size on any number of threads; state dicts; a delta that is held whole and filtered."""
    from safetensors.torch import load_file, save_file

    g = torch.Generator().manual_seed(4)
    base = {k: torch.randn(s, generator=g).to(dtype) for k, s in ODD.items()}
    models = [
        {k: (v.float() + 0.01 * torch.randn(v.shape, generator=g)).to(dtype) for k, v in base.items()} for _ in "ab"
    ]
    for name, state in zip(["base", "a", "b"], [base, *models], strict=True):
        (tmp_path / name).mkdir()
        save_file(state, tmp_path / name / "model.safetensors")
    recipe = {"merge_method": "fr", "base_model": str(tmp_path / "base"), "parameters": {"lambda": 0.7, **kwargs}}
    recipe["models"] = [{"model": str(tmp_path / n)} for n in "ab"]
    want = fm.merge("fr", base, models, lambda_=0.7, **kwargs)
    for i, (chunk, threads) in enumerate([(1, 1), (1, 3), (3000, 2), (1 << 18, 2)]):
        monkeypatch.setattr(job_module, "chunk_elements", lambda *_, chunk=chunk: chunk)
        fm.run(fm.Recipe.model_validate(recipe), tmp_path / f"out{i}", threads=threads)
        got = load_file(tmp_path / f"out{i}" / "model.safetensors")
        for k in base:
            assert_same_bits(got[k], want[k], f"{k}, chunk {chunk}, {threads} threads")
    monkeypatch.setattr(fr_module, "_in_two_passes", lambda *_: False)
    whole = fm.merge("fr", base, models, lambda_=0.7, **kwargs)
    for k in base:
        assert_same_bits(whole[k], want[k], k)


def test_the_plan_counts_thin_spectra(tmp_path):
    from safetensors.torch import save_file

    state = {"embed": torch.randn(40000, 64).bfloat16()}
    for name in ("base", "a"):
        (tmp_path / name).mkdir()
        save_file(state, tmp_path / name / "model.safetensors")
    recipe = {"merge_method": "fr", "base_model": str(tmp_path / "base"), "models": [{"model": str(tmp_path / "a")}]}
    held = {}
    for key, parameters in (("thin", {}), ("whole", {"mask": "disc_min"}), ("unfiltered", {"select": "layers"})):
        plan = fm.run(fm.Recipe.model_validate(recipe | {"parameters": parameters}), None, dry_run=True, threads=1)
        held[key] = plan.estimate["buffer_bytes"]
    columns = 8 * 40000  # bytes of one: the radial mask touches 4 of 33
    work = 2 * 128 * 2 * 40000  # of two threads at most
    assert held["unfiltered"] + 4 * columns < held["thin"] < held["unfiltered"] + 4 * columns + work
    assert held["whole"] > held["unfiltered"] + 33 * columns
    with pytest.raises(BadInput, match="max-memory"):
        fm.run(fm.Recipe.model_validate(recipe), None, dry_run=True, threads=1, max_memory=held["unfiltered"])


@pytest.mark.parametrize(
    ("kwargs", "match"),
    [
        ({"reference_bugs": True}, "preset"),
        ({"ring_double": True}, "disc_min"),
        ({"select": "("}, "regular expression"),
        ({"cutoff": -1.0}, "cutoff"),
        ({"mask": "disc"}, "mask"),
        ({"preset": "vit9"}, "preset"),
    ],
)
def test_bad_parameters_are_named(kwargs, match):
    base, models = family(1)
    with pytest.raises(BadInput, match=match):
        fm.merge("fr", base, models, **kwargs)


def test_a_non_finite_block_does_not_spoil_the_coefficients():
    base, models = family(2)
    models[0]["embed.weight"] = models[0]["embed.weight"].clone()
    models[0]["embed.weight"][0, 0] = math.nan
    merged = fm.merge("fr", base, models, nan="allow")
    assert merged["embed.weight"].isnan().all()
    assert all(v.isfinite().all() for k, v in merged.items() if k != "embed.weight")

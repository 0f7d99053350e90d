"""Muon and AdamW as one optimizer: torch's own are the judges."""

import pytest
import torch
from conftest import Source, ragged_batch, run_training

from trainer.optimizer import ADAMW_RMS, BETAS, MuonAdamW, orthogonalized, param_groups
from trainer.runtime import multiplies_bf16


def test_muon_has_the_linears_adamw_the_rest_and_vectors_do_not_decay(tiny_model):
    matrices, muon, vectors = groups = param_groups(tiny_model, 0.1, "muon")
    assert [group["weight_decay"] for group in groups] == [0.1, 0.1, 0.0]
    assert [group["muon"] for group in groups] == [False, True, False]
    assert {p.dim() for p in vectors["params"]} == {1} and {p.dim() for p in muon["params"]} == {2}
    # The tied head, once.
    assert [id(p) for p in matrices["params"]] == [id(tiny_model.output.weight)]
    grouped = [id(p) for group in groups for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in tiny_model.parameters())
    matrices, _ = param_groups(tiny_model, 0.1)
    assert not matrices["muon"] and len(matrices["params"]) == 1 + 7 * tiny_model.config.n_layers


def test_a_step_is_that_of_torchs_muon_and_adamw(tiny_model, monkeypatch):
    # torch's does no other.
    monkeypatch.setattr("trainer.optimizer.multiplies_bf16", lambda device: True)
    twin = type(tiny_model)(tiny_model.config)
    twin.load_state_dict(tiny_model.state_dict())
    ours = MuonAdamW(param_groups(tiny_model, 0.1, "muon"), 1e-2)
    matrices, muon, vectors = param_groups(twin, 0.1, "muon")
    theirs = [
        torch.optim.AdamW([matrices, vectors], lr=1e-2, betas=BETAS, fused=True),
        torch.optim.Muon(muon["params"], lr=1e-2, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
    ]
    assert {p.size(0) > p.size(1) for p in muon["params"]} == {True, False}
    for step in range(3):
        for p, q in zip(tiny_model.parameters(), twin.parameters(), strict=True):
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(step))
            q.grad = p.grad.clone()
        for optimizer in (ours, *theirs):
            optimizer.step()
    for p, q in zip(tiny_model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("shape", [(48, 48), (16, 64), (64, 16), (1, 5)])
def test_orthogonalized_keeps_the_directions_and_evens_out_their_sizes(shape):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    u, _, v = torch.linalg.svd(matrix, full_matrices=False)
    (found,) = orthogonalized(matrix[None], torch.float32)
    inside = u.mT @ found @ v.mT  # diagonal, if nothing was turned
    sizes = inside.diag()
    assert (inside - sizes.diag()).abs().max() < 1e-4
    assert sizes.max() < 1.25 and sizes.median() > 0.6 and sizes.min() > 0
    rough = orthogonalized(matrix[None], torch.bfloat16)[0]
    assert rough.dtype == torch.bfloat16 and (rough - u @ inside @ v).norm() < 0.1 * sizes.norm()


def test_no_gradient_no_step_and_a_zero_gradient_is_survived(tiny_model):
    optimizer = MuonAdamW(param_groups(tiny_model, 0.0, "muon"), 1e-2)
    weights = [p.clone() for p in tiny_model.parameters()]
    weight = tiny_model.layers[0].attention.wq.weight
    weight.grad = torch.zeros_like(weight)
    optimizer.step()
    for before, after in zip(weights, tiny_model.parameters(), strict=True):
        assert torch.equal(before, after)
    assert len(optimizer.state) == 1


def test_updates_are_as_large_as_adamws(tiny_model):
    optimizer = MuonAdamW(param_groups(tiny_model, 0.0, "muon"), 1.0)
    weight = tiny_model.layers[0].feed_forward.w1.weight
    weight.grad, before = torch.randn_like(weight), weight.detach().clone()
    optimizer.step()
    assert (weight.detach() - before).square().mean().sqrt() == pytest.approx(ADAMW_RMS, rel=0.2)


def test_an_overflowing_fp16_step_is_skipped_whole(tiny_model):
    optimizer = MuonAdamW(param_groups(tiny_model, 0.1, "muon"), 1e-2)
    scaler = torch.amp.GradScaler("cpu")
    weights = [p.clone() for p in tiny_model.parameters()]
    scaler.scale(tiny_model.norm.weight.sum() * 0).backward()  # only makes the scale
    for parameter in tiny_model.parameters():
        parameter.grad = torch.ones_like(parameter)
    tiny_model.norm.weight.grad.fill_(torch.inf)  # in AdamW's part
    scaler.unscale_(optimizer)
    scaler.step(optimizer)
    for before, after in zip(weights, tiny_model.parameters(), strict=True):
        assert torch.equal(before, after)


def test_products_are_in_bf16_where_they_are_fast(monkeypatch):
    cpu = torch.device("cpu")
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True, "avx512_bf16": False})
    assert not multiplies_bf16(cpu)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": True})
    assert multiplies_bf16(cpu)
    monkeypatch.delattr(torch.cpu, "get_capabilities")  # an older torch
    assert not multiplies_bf16(cpu)
    for native in (True, False):  # a Turing GPU says yes unless asked about its own instructions

        def supported(including_emulation=True, own=native):
            return including_emulation or own

        monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
        assert multiplies_bf16(torch.device("cuda")) == native


def test_muon_learns_what_adamw_learns(tiny_model, tmp_path):
    twin = type(tiny_model)(tiny_model.config)
    twin.load_state_dict(tiny_model.state_dict())
    batches = [ragged_batch(4, seed=seed) for seed in range(3)]
    losses = {}
    for name, model in (("adamw", tiny_model), ("muon", twin)):
        settings = {"epochs": 5, "optimizer": name}
        summary = run_training(model, Source(batches), tmp_path / name, **settings)
        losses[name] = summary.last_loss
    assert losses["muon"] < losses["adamw"]

"""Muon and AdamW as one optimizer: torch's own are the judges."""

import pytest
import torch
from conftest import Source, ragged_batch, run_training

from trainer.optimizer import ADAMW_RMS, BETAS, MuonAdamW, orthogonalized, param_groups
from trainer.runtime import multiplies_bf16


def test_muon_has_the_linears_adamw_the_rest_and_vectors_do_not_decay(tiny_model):
    matrices, muon, vectors = param_groups(tiny_model, 0.1, "muon")
    assert [group["weight_decay"] for group in (matrices, vectors, muon)] == [0.1, 0.0, 0.1]
    assert [group["muon"] for group in (matrices, vectors, muon)] == [False, False, True]
    assert all(p.dim() == 1 for p in vectors["params"]) and all(
        p.dim() == 2 for p in muon["params"]
    )
    assert [id(p) for p in matrices["params"]] == [id(tiny_model.output.weight)], (
        "the tied head, once"
    )
    assert sum(p.numel() for group in (matrices, vectors, muon) for p in group["params"]) == sum(
        p.numel() for p in tiny_model.parameters()
    )
    matrices, _ = param_groups(tiny_model, 0.1)
    assert not matrices["muon"] and len(matrices["params"]) == 1 + 7 * tiny_model.config.n_layers


def test_a_step_is_that_of_torchs_muon_and_adamw(tiny_model, monkeypatch):
    monkeypatch.setattr(
        "trainer.optimizer.multiplies_bf16", lambda device: True
    )  # torch's does no other
    twin = type(tiny_model)(tiny_model.config)
    twin.load_state_dict(tiny_model.state_dict())
    ours = MuonAdamW(param_groups(tiny_model, 0.1, "muon"), 1e-2)
    matrices, muon, vectors = param_groups(twin, 0.1, "muon")
    theirs = [
        torch.optim.AdamW([matrices, vectors], lr=1e-2, betas=BETAS, fused=True),
        torch.optim.Muon(muon["params"], lr=1e-2, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
    ]
    assert any(p.size(0) > p.size(1) for p in muon["params"]) and any(
        p.size(0) < p.size(1) for p in muon["params"]
    )
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
    inside = u.mT @ orthogonalized(matrix, torch.float32) @ v.mT  # diagonal, if nothing was turned
    sizes = inside.diag()
    assert (inside - sizes.diag()).abs().max() < 1e-4
    assert sizes.max() < 1.25 and sizes.median() > 0.6 and sizes.min() > 0
    rough = orthogonalized(matrix, torch.bfloat16)
    assert rough.dtype == torch.bfloat16 and (rough - u @ inside @ v).norm() < 0.1 * sizes.norm()


def test_no_gradient_no_step_and_a_zero_gradient_is_survived(tiny_model):
    optimizer = MuonAdamW(param_groups(tiny_model, 0.0, "muon"), 1e-2)
    weights = [p.clone() for p in tiny_model.parameters()]
    tiny_model.layers[0].attention.wq.weight.grad = torch.zeros_like(
        tiny_model.layers[0].attention.wq.weight
    )
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
    optimizer, scaler = (
        MuonAdamW(param_groups(tiny_model, 0.1, "muon"), 1e-2),
        torch.amp.GradScaler("cpu"),
    )
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
    for emulates in (True, False):  # a Turing GPU says yes, unless asked about its own instructions
        monkeypatch.setattr(
            torch.cuda,
            "is_bf16_supported",
            lambda including_emulation=True, says=emulates: not says,
        )
        assert multiplies_bf16(torch.device("cuda")) == (not emulates)


def test_a_torch_that_does_not_tell_its_processor_gets_float32(monkeypatch):
    monkeypatch.delattr(torch.cpu, "get_capabilities")
    assert not multiplies_bf16(torch.device("cpu"))


def test_muon_learns_what_adamw_learns(tiny_model, tmp_path):
    twin = type(tiny_model)(tiny_model.config)
    twin.load_state_dict(tiny_model.state_dict())
    batches = [ragged_batch(4, seed=seed) for seed in range(3)]
    losses = [
        run_training(model, Source(batches), tmp_path / name, epochs=5, optimizer=name).last_loss
        for name, model in (("adamw", tiny_model), ("muon", twin))
    ]
    assert losses[1] < losses[0]

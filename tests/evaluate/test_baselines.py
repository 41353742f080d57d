"""The schemes we compare with, against their definitions."""

import pytest
import torch

from turboquant.evaluate.baselines import BASELINES, RING, SINKS, _attention


@pytest.fixture
def kv():
    x = torch.randn(2, 3, 200, 64)
    return x * torch.linspace(0.2, 4, 64) + torch.linspace(-3, 3, 64)


@pytest.mark.parametrize(
    ("name", "bits"),
    [
        ("plain4", (4.25, 4.25)),
        ("plain3", (3.25, 3.25)),
        ("kivi-g32", (5.0, 4.25)),
        ("kivi-g128", (4.25, 4.25)),
        ("int4-token", (4.5, 4.5)),
        ("int8-token", (8.25, 8.25)),
    ],
)
def test_true_bits_at_head_dim_64(name, bits):
    for n in (name, name + "+ring"):
        assert (BASELINES[n].key_bits(64), BASELINES[n].value_bits(64)) == bits


def test_kivi_keys_lie_on_16_levels_of_each_channel_and_group(kv):
    got = BASELINES["kivi-g32"].keys(kv)
    for channel in (0, 40):
        group = got[1, 2, 64:96, channel]
        assert len(group.unique()) <= 16
        want = kv[1, 2, 64:96, channel]
        step = (want.max() - want.min()) / 15
        assert (group - want).abs().max() < 0.51 * step + 0.002 * want.abs().max()
    assert torch.equal(got[:, :, 192:], kv[:, :, 192:]), "an incomplete group stays as it is"
    assert not torch.equal(got[:, :, :192], kv[:, :, :192])


def test_int8_is_absmax_of_each_token_and_head(kv):
    got = BASELINES["int8-token"].keys(kv)
    step = (kv.abs().amax(-1, keepdim=True) / 127).half().float()
    assert torch.equal(got, (kv / step).round().clamp(-127, 127) * step)


def test_distortion_of_the_paper_keeps_its_bound():
    from turboquant.maths.bounds import mse_upper

    x = torch.randn(1, 1, 4000, 64)
    for name, bits in (("plain4", 4), ("plain3", 3)):
        error = (BASELINES[name].keys(x) - x).square().sum() / x.square().sum()
        assert error < 1.02 * mse_upper(bits)


@pytest.mark.parametrize("name", ["plain3", "plain3+ring", "kivi-g32+ring"])
@pytest.mark.parametrize("window", [None, 150])
def test_attention_reads_exactly_the_copies_it_says(kv, name, window):
    """Against a loop over queries that builds the copy each of them may read."""
    scheme, t = BASELINES[name], kv.shape[2]
    q, v = torch.randn(2, 6, t, 64), torch.randn(2, 3, t, 64)
    i = torch.arange(t)
    see = (i <= i[:, None]) & (i[:, None] - i < (window or t))
    got, _ = _attention(scheme, torch.nn.Module(), q, kv, v, see[None, None] if window else None, scaling=0.1)
    k_hat, v_hat = scheme.keys(kv), scheme.values(v)
    for row in (0, 3, 127, 128, 131, 199):
        exact = (i > row - scheme.ring) | (i < scheme.sinks)
        k = torch.where(exact[:, None], kv, k_hat).repeat_interleave(2, 1)
        values = torch.where(exact[:, None], v, v_hat).repeat_interleave(2, 1)
        p = (q[:, :, row : row + 1] @ k.mT * 0.1).masked_fill(~see[row], -torch.inf).softmax(-1)
        torch.testing.assert_close(got[:, row], (p @ values)[:, :, 0], atol=2e-5, rtol=1e-4)
    assert (scheme.ring, scheme.sinks) == ((RING, SINKS) if "ring" in name else (0, 0))


def test_softcap_and_sink_logits_take_part(kv):
    q, v = torch.randn(2, 3, 200, 64), torch.randn(2, 3, 200, 64)
    scheme, sink = BASELINES["int8-token"], torch.tensor([0.5, 1.0, 2.0])
    got, _ = _attention(scheme, torch.nn.Module(), q, kv, v, None, scaling=0.1, softcap=5.0, s_aux=sink)
    logits = torch.tanh(q[:, :, -1:] @ scheme.keys(kv).mT * 0.1 / 5) * 5
    p = torch.cat([logits, sink.view(1, 3, 1, 1).expand(2, 3, 1, 1)], -1).softmax(-1)[..., :-1]
    torch.testing.assert_close(got[:, -1], (p @ scheme.values(v))[:, :, 0], atol=2e-5, rtol=1e-4)

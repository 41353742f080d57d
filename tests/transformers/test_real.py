"""SmolLM2-135M-Instruct, as its package ships it: what a user sees first."""

import pytest
import torch

from turboquant.integrations.transformers import TurboQuantCache
from turboquant.packed.page import PageLayout

PROMPT = 270  # tokens: the ring and two pages behind it


@pytest.fixture(scope="module")
def smollm2(smollm2_gguf, prose):
    """Model and a prompt of real text."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where = dict(pretrained_model_name_or_path=smollm2_gguf.parent, gguf_file=smollm2_gguf.name)
    tokenizer = AutoTokenizer.from_pretrained(**where)
    model = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32).eval()
    ids = torch.tensor([tokenizer(prose[:4000]).input_ids[:PROMPT]])
    return model, ids


@pytest.mark.slow
def test_main_job(smollm2):
    """kv4 generates what the model generates, and its next-token distributions stay close."""
    model, ids = smollm2
    inputs = dict(input_ids=ids, attention_mask=torch.ones_like(ids))
    with torch.no_grad():
        want = model.generate(**inputs, max_new_tokens=20, do_sample=False)[0, PROMPT:]
        exact = model(torch.cat([ids, want[None]], 1), use_cache=False).logits[0, -21:-1].log_softmax(-1)
        cache, plain = TurboQuantCache(model, "kv4"), TurboQuantCache(model, "plain4:page=16,ring=31,sinks=0,rewind=16")
        got = model.generate(**inputs, past_key_values=cache, max_new_tokens=20, do_sample=False)[0, PROMPT:]
        kl = []
        for c in (TurboQuantCache(model, "kv4"), plain):
            c.row_exact = True
            logs = model(torch.cat([ids, want[None]], 1), past_key_values=c).logits[0, -21:-1].log_softmax(-1)
            kl.append((exact.exp() * (exact - logs)).sum(-1).mean().item())
    assert (got == want).float().mean() >= 0.8, (got, want)
    assert 0 < kl[0] < 0.002 and kl[0] < kl[1] / 10, kl
    layout = PageLayout(cache.recipe.kv, 64)
    key_bits, value_bits = cache.bits()
    assert (key_bits, value_bits) == pytest.approx((layout.key_bits, layout.value_bits))
    assert 4 < key_bits <= 5.0 and 4 < value_bits <= 4.35
    assert cache.nonfinite_tokens == 0

"""Checkpoints of every family, read and written: the public implementations' own logits and weights."""

import pytest
import torch

from archs.checkpoints import SUPPORTED, read, read_config, write

pytestmark = pytest.mark.thorough


@torch.no_grad()
def test_logits_are_those_of_the_public_implementation_whole_and_token_by_token(
    variant, build, tokens, distance, tmp_path
):
    theirs = build(variant)
    theirs.save_pretrained(tmp_path)
    expected = theirs(tokens, use_cache=False).logits
    assert expected.std() > 0.1
    model = read(tmp_path)
    assert distance(model(tokens), expected) < 1e-4

    hidden, states = model.extend(tokens[:, :31], model.empty_states(2))
    got = [hidden]
    for t in range(31, 45):
        hidden, states = model.extend(tokens[:, t : t + 1], states)
        got.append(hidden)
    assert distance(model.logits(torch.cat(got, 1)), expected) < 1e-4


@torch.no_grad()
def test_every_weight_of_a_model_matters(variant, build, tokens, distance, tmp_path):
    """Without this the test of the logits could not see a term that is left out."""
    build(variant).save_pretrained(tmp_path)
    model = read(tmp_path)
    expected = model(tokens)
    seen = set()
    kinds = {
        key: ".".join(part for part in key.split(".") if not part.isdigit()) for key, _ in model.named_parameters()
    }
    for key, p in model.named_parameters():
        if kinds[key] in seen:
            continue
        kept = p.clone()
        # Noise and not a factor: a norm behind a matrix takes factors out again.
        p.add_(0.5 * p.std(correction=0).clamp(min=0.1) * torch.randn_like(p))
        if distance(model(tokens), expected) > 1e-3:
            seen.add(kinds[key])
        p.copy_(kept)
    assert set(kinds.values()) - seen == set()


@torch.no_grad()
def test_the_public_implementation_reads_what_we_write(variant, build, transformers, tokens, distance, tmp_path):
    theirs = build(variant)
    theirs.save_pretrained(tmp_path / "theirs")
    write(read(tmp_path / "theirs"), tmp_path / "ours", read_config(tmp_path / "theirs"))
    again, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "ours", attn_implementation="eager", output_loading_info=True
    )
    assert not any(report.values())
    assert distance(again(tokens, use_cache=False).logits, theirs(tokens, use_cache=False).logits) < 1e-5

    # A factor or a shift of the norms, and one of Gemma's embeddings, are folded: rounded once and back.
    folded = {"gemma3_text": ["norm", "embed", "lm_head"], "qwen3_next": ["norm"]}
    folded = folded.get(variant["model_type"], ["model.norm"] if again.config.tie_word_embeddings else [])
    weights = again.state_dict()
    for name, expected in theirs.state_dict().items():
        if any(part in name for part in folded):
            assert torch.allclose(weights[name], expected, rtol=2e-7, atol=1.2e-7), name
        else:
            assert torch.equal(weights[name], expected), name


def test_every_supported_type_is_proven_here(families):
    assert set(families) == set(SUPPORTED)

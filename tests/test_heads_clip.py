"""CLIP's zero-shot score: that of transformers' own CLIP."""

from __future__ import annotations

import pytest
import torch
import transformers
from _head_equations import CHANNELS, check_equations
from _models import LENGTHS, SMALL, pixels, token_ids
from laps import LAPS, LapsValueError
from laps.encoders import ImageEncoder, TextEncoder
from laps.heads import build_head

pytestmark = pytest.mark.usefixtures("one_thread")


def test_the_score_is_the_cosine_of_the_first_and_the_last_token() -> None:
    head = build_head("clip", embed_dim=CHANNELS, num_patches=5)
    check_equations(head, lambda v, w: torch.cosine_similarity(v[0], w[-1], dim=0))
    assert head.default_loss == {"name": "info_nce"}


def test_an_encoder_without_a_first_token_is_refused() -> None:
    with pytest.raises(LapsValueError, match=r"no \[CLS\] token"):
        build_head("clip", embed_dim=CHANNELS, num_patches=5, num_prefix_tokens=0)


def test_a_pretrained_clip_ranks_as_it_does_by_itself() -> None:
    torch.manual_seed(0)
    own = {**SMALL, "projection_dim": 24}
    text = transformers.CLIPTextConfig(**own, vocab_size=99, bos_token_id=0, eos_token_id=98)
    vision = transformers.CLIPVisionConfig(**own, image_size=32, patch_size=8)
    config = transformers.CLIPConfig(
        text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=24
    )
    whole = transformers.CLIPModel(config).eval()
    images = transformers.CLIPVisionModelWithProjection(whole.config.vision_config).eval()
    images.load_state_dict(whole.state_dict(), strict=False)
    texts = transformers.CLIPTextModelWithProjection(whole.config.text_config).eval()
    texts.load_state_dict(whole.state_dict(), strict=False)
    ids, lengths = token_ids(LENGTHS)
    ids = ids.clamp(max=97)
    ids[torch.arange(len(ids)), lengths - 1] = 98
    mask = torch.arange(ids.shape[1]) < lengths[:, None]
    seen = pixels(3)
    with torch.no_grad():
        logits = whole(input_ids=ids, attention_mask=mask.long(), pixel_values=seen).logits_per_image
        expected = logits / whole.logit_scale.exp()
        image_encoder, text_encoder = ImageEncoder(images), TextEncoder(texts)
        head = build_head(
            "clip",
            embed_dim=image_encoder.embed_dim,
            num_patches=image_encoder.num_patches,
            num_prefix_tokens=image_encoder.num_prefix_tokens,
        )
        model = LAPS(image_encoder, text_encoder, head).eval()
        scores = model.similarity(model.encode_image(seen), model.encode_text(ids, lengths))
    torch.testing.assert_close(scores, expected, rtol=0, atol=1e-6)

"""``tiny/blip``: BLIP's image-text retrieval model with trained contrastive heads.

It starts from the vision encoder and Q-Former of ``tiny/itm``. Beside the contrastive loss, its vectors are distilled
from those of ``tiny/clip`` (arXiv 1503.02531), as 32 pairs per step are few for contrastive learning.
"""

from __future__ import annotations

import argparse
import io
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from open_clip import CLIP
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional
from transformers import (
    AutoProcessor,
    BertTokenizer,
    Blip2ForImageTextRetrieval,
    BlipConfig,
    BlipForImageTextRetrieval,
    BlipImageProcessor,
    BlipProcessor,
)

from ...bundled import resolve
from ...pretrained import load_weights
from ...scorers.clip import encode_trimmed
from ..world.scenes import PLACES
from .architectures import SIDE, written
from .dual_encoder import EMBED, TEXT_LAYERS, WIDTH, build_bert_tokenizer, build_clip
from .eval.captioner import BATCH
from .eval.scorers import subjects
from .plain_models import TOWER
from .train_clip_itm import SLOT, ClipItmPlan, ClipItmTrainer, ClipTrainer, PairBatch, normalised
from .train_plain_captioner import matcher
from .vision import MEAN, STD

FIRST_SCALE = 14.3  # CLIP's first temperature, 0.07
LED = 4.0  # weight of the distillation loss


def build_blip(tokenizer: BertTokenizer, seen: Blip2ForImageTextRetrieval) -> BlipForImageTextRetrieval:
    """BLIP with vision and text encoder initialised from ``seen``; its projections and matching head are new."""
    config = BlipConfig(
        vision_config={**TOWER, "attention_dropout": 0.0},
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": WIDTH,
            "encoder_hidden_size": WIDTH,
            "intermediate_size": 3 * WIDTH,
            "num_hidden_layers": TEXT_LAYERS,
            "num_attention_heads": WIDTH // 32,
            "max_position_embeddings": 512,
            "hidden_dropout_prob": 0.0,
            "attention_probs_dropout_prob": 0.0,
            "bos_token_id": tokenizer.cls_token_id,
            "eos_token_id": tokenizer.sep_token_id,
            "sep_token_id": tokenizer.sep_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        },
        image_text_hidden_size=EMBED,
    )
    model = BlipForImageTextRetrieval(config)
    model.vision_model.load_state_dict(seen.vision_model.state_dict())
    model.text_encoder.load_state_dict(text_weights(seen))
    return model


def text_weights(seen: Blip2ForImageTextRetrieval) -> dict[str, Tensor]:
    """The text weights of ``seen`` under the names of BLIP's text encoder."""
    renamed = {f"embeddings.LayerNorm.{name}": value for name, value in seen.qformer.layernorm.state_dict().items()} | {
        f"embeddings.{name}": value for name, value in seen.embeddings.state_dict().items() if name.endswith("weight")
    }
    for name, value in seen.qformer.encoder.state_dict().items():
        if "_query" not in name:
            renamed[f"encoder.{name.replace('attention.attention.', 'attention.self.')}"] = value
    return renamed


def load_leader(tokenizer: BertTokenizer) -> CLIP:
    """``tiny/clip`` in float32, frozen, to distil from."""
    model = build_clip("clip", tokenizer)
    weights = load_file(Path(resolve("tiny/clip")) / "open_clip_model.safetensors")
    model.load_state_dict({name: value.float() for name, value in weights.items()})
    return model.requires_grad_(False).eval()


class BlipTrainer(ClipTrainer):
    """Contrastive training as for the CLIPs, with BLIP's encoders and distillation."""

    model: BlipForImageTextRetrieval  # type: ignore[assignment]

    def __init__(self, plan: ClipItmPlan) -> None:
        torch.manual_seed(plan.seed)
        tokenizer = build_bert_tokenizer(0)  # the same as of tiny/itm and tiny/clip
        self.model, self.leader = build_blip(tokenizer, matcher()), load_leader(tokenizer)
        self.log_scale = nn.ParameterList([nn.Parameter(torch.tensor(FIRST_SCALE).log())])
        ClipItmTrainer.__init__(self, plan, tokenizer, SLOT, nn.Linear(EMBED, len(PLACES) * SLOT), self.log_scale)

    def see(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        states = self.model.vision_model(pixel_values=pixels).last_hidden_state
        return functional.normalize(self.model.vision_proj(states[:, 0]), dim=-1), states[:, 1:]

    def encode(self, ids: Tensor) -> Tensor:
        mask = (ids != self.tokenizer.pad_token_id).long()
        states = self.model.text_encoder(input_ids=ids, attention_mask=mask).last_hidden_state
        return functional.normalize(self.model.text_proj(states[:, 0]), dim=-1)

    def scale(self) -> Tensor:
        scale: Tensor = self.log_scale[0]
        return scale.exp().clamp(max=100)

    def losses(self, pooled: Tensor, tokens: Tensor, batch: PairBatch, whole: bool) -> tuple[Tensor, dict[str, float]]:
        """Losses on captions and sentences in alternate steps: both in each step would take twice the time."""
        of_captions = self.progress.step % 2 == 0
        texts = batch.captions if of_captions else batch.sentences
        encoded = self.encode(texts)
        if of_captions:
            loss, figures = self.of_captions(pooled, encoded, self.encode(batch.false_captions))
        else:
            loss, figures = self.of_sentences(pooled, encoded, self.encode(batch.false_sentences))
        with torch.no_grad():
            image = functional.normalize(self.leader.visual(normalised(batch.pixels)), dim=-1)
            text = functional.normalize(encode_trimmed(self.leader, texts), dim=-1)
        image_off, text_off = 1 - (pooled * image).sum(-1).mean(), 1 - (encoded * text).sum(-1).mean()
        figures |= {"loss": loss.item(), "image_off": image_off.item(), "text_off": text_off.item()}
        return loss + LED * (image_off + text_off), figures

    def export(self, folder: Path) -> None:
        copy = BlipForImageTextRetrieval(self.model.config)
        copy.load_state_dict(self.model.state_dict())
        copy.to(torch.bfloat16)
        images = BlipImageProcessor(size={"height": SIDE, "width": SIDE}, image_mean=list(MEAN), image_std=list(STD))
        with written(folder) as temporary:
            copy.save_pretrained(temporary)
            BlipProcessor(images, self.tokenizer).save_pretrained(temporary)


@torch.inference_mode()
def recalls(folder: str, count: int, seed: int = 11) -> dict[str, float]:
    """Text-to-image recall@1, @5 and @10 of dense captions among ``count`` held-out images."""
    model = load_weights(BlipForImageTextRetrieval, folder, dtype=torch.float32, called=folder).eval()
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=False)
    of = subjects(count, seed)
    images, texts = [], []
    for start in range(0, count, BATCH):
        some = of[start : start + BATCH]
        pictures = [Image.open(io.BytesIO(subject.sample.image)).convert("RGB") for subject in some]
        states = model.vision_model(**processor(images=pictures, return_tensors="pt")).last_hidden_state
        images.append(functional.normalize(model.vision_proj(states[:, 0]), dim=-1))
        inputs = processor(text=[subject.true for subject in some], padding=True, return_tensors="pt")
        read = model.text_encoder(input_ids=inputs.input_ids, attention_mask=inputs.attention_mask).last_hidden_state
        texts.append(functional.normalize(model.text_proj(read[:, 0]), dim=-1))
    likeness = torch.cat(texts) @ torch.cat(images).T
    rank = (likeness > likeness.diagonal()[:, None]).sum(1)
    return {f"recall@{best}": (rank < best).float().mean().item() for best in (1, 5, 10)}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Measure BLIP's contrastive heads on held-out scenes.")
    parser.add_argument("folder", help="an exported model, or tiny/blip")
    parser.add_argument("--scenes", type=int, default=1000)
    options = parser.parse_args(arguments)
    print(json.dumps(recalls(resolve(options.folder), options.scenes)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

"""A local page to drop a picture on: the top classes, and where the model looks. Needs gradio (pip install gradio)."""

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from analysis import tables
from common.errors import UserError
from datasets import image_folder

SIDE = 384  # pixels of the explanation on the page


def build(predictor, topk):
    """The page as a gradio.Blocks. Raises UserError without gradio."""
    try:
        import gradio
    except ImportError as error:
        raise UserError("--serve shows its page with gradio: pip install gradio") from error

    def answer(picture):
        return try_picture(predictor, picture, topk) if picture is not None else (None, None)

    with gradio.Blocks(
        title=f"{predictor.card['model']} on {predictor.card['dataset']}", analytics_enabled=False
    ) as page:
        known = ", ".join(predictor.classes[:30]) + " …" * (len(predictor.classes) > 30)
        words = (
            f"{predictor.card['model']}, trained on {predictor.card['dataset']}",
            f"It knows: {known}.",
        )
        gradio.Markdown("# {}\n{}".format(*map(tables.markdown_text, words)))
        with gradio.Row():
            picture = gradio.Image(
                type="pil", label="a picture", height=SIDE, sources=["upload", "clipboard"]
            )
            with gradio.Column():
                label = gradio.Label(num_top_classes=topk, label="what it is taken for")
                looked = gradio.Image(label="where it looks", height=SIDE, interactive=False)
        picture.change(answer, picture, [label, looked])
    return page


def try_picture(predictor, picture, topk):
    """({class: probability} of the topk, uint8 RGB (SIDE, SIDE, 3) of where it looks or None) of a PIL picture of any size."""
    images = torch.from_numpy(
        image_folder.square(picture, predictor.card["image_size"]).copy()
    ).permute(2, 0, 1)[None]
    probabilities = predictor.logits(images).softmax(1)[0]
    top = probabilities.topk(min(topk, len(probabilities)))
    named = {predictor.classes[c]: p for c, p in zip(top.indices.tolist(), top.values.tolist())}
    try:
        heat = predictor.explain(images, top.indices[:1])[0]
    except UserError:  # a model that can't be looked into answers all the same
        return named, None
    heat = F.interpolate(heat[None], (SIDE, SIDE), mode="bilinear")[0, 0, :, :, None].numpy()
    gray = np.array(Image.fromarray(image_folder.square(picture, SIDE)).convert("L"))[..., None]
    colour = np.array([249, 142, 9])
    return named, (gray * (1 - 0.65 * heat) + colour * 0.65 * heat).astype(np.uint8)


def serve(predictor, topk, host, port):
    """Serves the page until Ctrl-C. Raises UserError without gradio or where the port is taken."""
    page = build(predictor, topk)
    try:
        page.launch(server_name=host, server_port=port or None, share=False, inbrowser=False)
    except OSError as error:
        raise UserError(f"--port {port}: {error}") from error

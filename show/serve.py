"""A local page to try images on: the top classes, and where the model looks. Needs gradio."""

import numpy as np
import torch.nn.functional as F
from PIL import Image

from analysis import formats
from common.errors import UserError, first_line
from show import predict

SIDE = 384  # pixels of the explanation on the page
HIGHLIGHT = np.array([249, 142, 9])  # RGB


def serve(predictor, topk, host, port):
    """Serves the page until Ctrl-C. Raises UserError without gradio or if it can't be served."""
    page = build(predictor, topk)
    try:
        page.launch(server_name=host, server_port=port or None, share=False, inbrowser=False)
    except Exception as error:  # OSError, ValueError and Exception itself
        raise UserError(f"--serve on {host}, port {port}: {first_line(error)}") from error


def build(predictor, topk):
    """The page as a gradio.Blocks. Raises UserError without gradio."""
    try:
        import gradio
    except ImportError as error:
        raise UserError("--serve needs gradio: pip install gradio") from error

    title = f"{predictor.card['model']}, trained on {predictor.card['dataset']}"
    classes = ", ".join(predictor.classes[:30]) + (" …" if len(predictor.classes) > 30 else "")

    def answer(file):
        try:
            return classify(predictor, file, topk) if file else (None, None)
        except UserError as error:
            raise gradio.Error(str(error)) from error

    with gradio.Blocks(title=title, analytics_enabled=False) as page:
        heading, known = formats.markdown_text(title), formats.markdown_text(f"Classes: {classes}.")
        gradio.Markdown(f"# {heading}\n{known}")
        with gradio.Row():
            sources = ["upload", "clipboard"]
            # The file as it came: gradio would open formats that can start programs.
            kind = dict(type="filepath", image_mode=None)
            image = gradio.Image(label="an image", height=SIDE, sources=sources, **kind)
            with gradio.Column():
                label = gradio.Label(num_top_classes=topk, label="prediction")
                looked = gradio.Image(label="where it looks", height=SIDE, interactive=False)
        image.change(answer, image, [label, looked])
    return page


def classify(predictor, file, topk):
    """({class: probability} of the top k, where the model looks) for an image file of any size.

    Where it looks: uint8 RGB (SIDE, SIDE, 3), or None for a model that can't be explained. Raises
    UserError for a file that can't be read.
    """
    images, _ = predict.load_images([file], predictor.image_size)
    top = predictor.logits(images).softmax(1)[0].topk(min(topk, len(predictor.classes)))
    named = {predictor.classes[c]: p for c, p in zip(top.indices.tolist(), top.values.tolist())}
    try:
        heat = predictor.explain(images, top.indices[:1])[0]
    except UserError:
        return named, None
    heat = F.interpolate(heat[None], (SIDE, SIDE), mode="bilinear")[0, 0, :, :, None].numpy()
    pixels = predict.load_images([file], SIDE)[0][0].permute(1, 2, 0).numpy()
    gray = np.array(Image.fromarray(pixels).convert("L"))[..., None]
    return named, (gray * (1 - 0.65 * heat) + HIGHLIGHT * 0.65 * heat).astype(np.uint8)

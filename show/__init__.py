"""What show_example.py does with a checkpoint.

predict      loads checkpoints and chooses the images that are shown
tiles        draws images with their predictions
explain      where a model looks: Grad-CAM, attention rollout
assess       a report on a test split: confusion, calibration, robustness
corruptions  common corruptions of images at five strengths
export       ONNX, TorchScript and safetensors, with a README
serve        a local page to try a model on
"""

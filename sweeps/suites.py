"""The suites of sweep.py: lists of experiments, and questions that their differences answer.

An experiment is a name and some arguments of a training script. Arguments of the command line
(--epochs, --dataset, ...) override those of a suite, but not those that distinguish its
experiments. What a suite doesn't set is the recipe of the model or of the script.
"""

from typing import NamedTuple

from models import MODELS

# Arguments of a training script that every sweep decides, or that have no meaning in one.
DECIDED = {"seed", "tag", "list_models", "doctor", "resume", "resume_previous", "config"}


class Suite(NamedTuple):
    """Experiments {name: arguments of the script} that answer a question.

    details: (question, names of experiments, name of the baseline that each is compared with).
    shared: arguments of all experiments: data and length; settings: of all experiments, too, unless
    --own-recipes asks for each model's own. ranked: whether the table is sorted by accuracy.
    afterwards: commands of other scripts, with {root} for the directory of the sweep.
    """

    question: str
    experiments: dict
    details: tuple = ()
    shared: str = ""
    settings: str = ""
    script: str = "train"
    seeds: tuple = (0, 1, 2)
    ranked: bool = False
    afterwards: tuple = ()

    def comparisons(self):
        """(question, experiment, baseline) of each difference."""
        for question, experiments, baseline in self.details:
            for experiment in experiments.split():
                yield question, experiment, baseline


def for_each(names, arguments="--model {}"):
    """Experiments with the same arguments, but for the name."""
    return {name: arguments.format(name) for name in names.split()}


CIFAR100 = "--dataset cifar100"
LARGER_KERNELS = "ecanet20_fixed_k5 ecanet20_fixed_k7 ecanet20_fixed_k9"
ECA = f"ecanet20_fixed_k3 {LARGER_KERNELS} ecanet20_adaptive"
ADAPTED = [name for name, model in MODELS.items() if "stem" in model.options]
DEEPER = "resnet34 resnet50 resnet101 resnet152"
RATIOS = "ghost_resnet20-ratio3 ghost_resnet20-ratio4"
LARGEST = "eva02_large eva_giant convnext_xxlarge"
ZOO = f"""
resnet20 resnet32 resnet44 resnet56 resnet110 eca_resnet20 eca_resnet32 {ECA} resnet20_no_eca
ghost_resnet20 ghost_resnet32 improved_resnet20_convnext
ghostnet_100 convnext_tiny segnext_mscan_tiny mlp_mixer_tiny mlp_mixer_b16 cspresnet50 resnest50d
coatnet_0 coatnet_0_custom_enhanced coatnet_cifar_opt coatnet_cifar_opt_large_stem hornet_tiny
"""
# MixUp's alpha and the smoothing are those of models.recipes.LARGE; the other values are given.
CROP_FLIP_MIXUP = """--batch-size 128 --augment crop,flip --mixup 0.2 --cutmix 0 --mix-prob 1
--label-smoothing 0.1"""
RESIDUAL = f"--optimizer sgd --lr 0.1 {CROP_FLIP_MIXUP}"
# Without what the steps of the ladder don't name: averaged weights, smoothing, warmup, Nesterov.
BARE = "--batch-size 128 --lr 5e-3 --label-smoothing 0 --warmup-epochs 0 --ema-decay 0"
LADDER = "--optimizer sgd --no-nesterov --schedule cosine"
CROPPED = f"{LADDER} --crop-padding zero --augment crop,flip"
JITTERED = f"{CROPPED},color_jitter --jitter 0.4"
NO_MIXING = "--mixup 0 --cutmix 0"
BATCH_MIXING = "--mixup 1 --cutmix 1 --mix-prob 1 --mix-per batch"
AT_32 = f"{CIFAR100} --pretrained --image-size 32 --epochs 25"
FINE_TUNING = "--lr 5e-4 --weight-decay 1e-2 --batch-size 256 --layer-decay 1"
WARM_COSINE = "--schedule cosine --warmup-epochs 5"

# fmt: off
SUITES = {
    "ranking": Suite(
        "Which plain, residual or multi-scale network has the lowest error?",
        for_each("resnet18_ms resnet34 resnet18 plain18 plain34"),
        [("is the multi-scale one better than 34 layers?", "resnet18_ms", "resnet34"),
         ("are 34 residual layers better than 18?", "resnet34", "resnet18"),
         ("do shortcuts help 18 layers?", "resnet18", "plain18"),
         ("are 18 plain layers better than 34?", "plain18", "plain34")],
        "--epochs 150 --eval-train", "--optimizer sgd --lr 0.1 --batch-size 256", ranked=True),
    "degradation": Suite(
        "Do deeper plain networks fit and generalize worse, and do shortcuts prevent it?",
        for_each("plain18 plain34 resnet18 resnet34 plain20 plain32 plain44 plain56 "
             "resnet20 resnet32 resnet44 resnet56"),
        [("is the deeper plain network worse?", "plain34", "plain18"),
         ("is the deeper plain network worse?", "plain32 plain44 plain56", "plain20"),
         ("is the deeper residual network better?", "resnet34", "resnet18"),
         ("is the deeper residual network better?", "resnet32 resnet44 resnet56", "resnet20"),
         *[(f"do shortcuts help {n} layers?", f"resnet{n}", f"plain{n}")
           for n in (18, 34, 20, 32, 44, 56)]],
        "--eval-train"),
    "depth": Suite(
        "Are deeper residual networks better, trained with Adam and without augmentation?",
        for_each(f"resnet18 {DEEPER}"),
        [("is deeper better than 18 layers?", DEEPER, "resnet18"),
         ("are 101 layers better than 50?", "resnet101", "resnet50"),
         ("are 152 layers better than 101?", "resnet152", "resnet101")],
        "--epochs 200 --eval-train", "--optimizer adam --lr 5e-3 --batch-size 128 --augment none"),
    "multiscale": Suite(
        "Does a multi-scale module in each block improve ResNet-18?",
        for_each("resnet18 resnet18_ms"),
        [("does the module help?", "resnet18_ms", "resnet18")]),
    "eca": Suite(
        "Does channel attention (ECA) help, and with which kernel size?",
        for_each(f"resnet20_no_eca {ECA}"),
        [("does ECA help?", ECA, "resnet20_no_eca"),
         ("does the kernel size matter?", LARGER_KERNELS, "ecanet20_fixed_k3")],
        f"{CIFAR100} --epochs 300", RESIDUAL),
    "eca-position": Suite(
        "Where in the block does channel attention (ECA) help most?",
        for_each("none", "--model resnet20_no_eca")
        | for_each("bn1 bn2 add", "--model ecanet20_fixed_k3 --model-arg eca_position={}"),
        [("does the position matter?", "bn1 add", "bn2"),
         ("does ECA help there?", "bn1 bn2 add", "none")],
        f"{CIFAR100} --epochs 300", RESIDUAL),
    "ghost": Suite(
        "How much accuracy do ghost modules cost for the parameters that they save?",
        for_each("resnet20 resnet32 ghost_resnet20 ghost_resnet32")
        | {f"ghost_resnet20-ratio{n}": f"--model ghost_resnet20 --model-arg ratio={n}"
           for n in (3, 4)},
        [("what do ghost modules cost 20 layers?", f"ghost_resnet20 {RATIOS}", "resnet20"),
         ("what do ghost modules cost 32 layers?", "ghost_resnet32", "resnet32"),
         ("what does a larger ratio cost?", RATIOS, "ghost_resnet20"),
         ("are 32 layers with them better than 20 without?", "ghost_resnet32", "resnet20")],
        f"{CIFAR100} --epochs 300", RESIDUAL),
    "stems": Suite(
        "Are stems for 32x32 images better than those that were made for ImageNet?",
        for_each(" ".join(ADAPTED))
        | {f"{name}-imagenet": f"--model {name} --model-arg stem=imagenet" for name in ADAPTED},
        [("does the adapted stem help?", name, f"{name}-imagenet") for name in ADAPTED],
        CIFAR100),
    "zoo": Suite(
        "Which model for CIFAR-100 is best, and which is best for its size?",
        for_each(ZOO), shared=f"{CIFAR100} --epochs 300", settings=CROP_FLIP_MIXUP, ranked=True),
    "augmentation": Suite(
        "What does each augmentation add to SGD with a cosine schedule, and SGD to Adam?",
        {"adam": "--optimizer adam --schedule constant --augment none",
         "sgd-cosine": f"{LADDER} --augment none",
         "crop-flip": f"{CROPPED} {NO_MIXING}",
         "crop-flip-jitter": f"{JITTERED} {NO_MIXING}",
         "crop-flip-jitter-mix": f"{JITTERED} {BATCH_MIXING}"},
        [("is SGD with a cosine better than Adam?", "sgd-cosine", "adam"),
         ("do crop and flip help?", "crop-flip", "sgd-cosine"),
         ("does color jitter help after that?", "crop-flip-jitter", "crop-flip"),
         ("do CutMix and MixUp help after that?", "crop-flip-jitter-mix", "crop-flip-jitter"),
         ("do all of them help?", "crop-flip-jitter-mix", "sgd-cosine")],
        "--model resnet34 --epochs 500 --eval-train", BARE),
    "cnn-vs-vit": Suite(
        "Which fine-tunes better at 32 px, a convolutional network or a transformer?",
        for_each("nfnet_f0 vit_base_patch8"),
        [("is the convolutional network better?", "nfnet_f0", "vit_base_patch8")],
        AT_32, f"--optimizer adamw {FINE_TUNING} {WARM_COSINE}", "train_vit", seeds=(3407,)),
    "optimizer-schedule": Suite(
        "Do AdamW and a cosine with warmup fine-tune NFNet-F0 better than SGD or a linear decay?",
        {"adamw-cosine": f"--optimizer adamw {WARM_COSINE}",
         "sgd-cosine": f"--optimizer sgd --no-nesterov {WARM_COSINE}",
         "adamw-linear": "--optimizer adamw --schedule linear --warmup-epochs 0"},
        [("is AdamW better than SGD?", "adamw-cosine", "sgd-cosine"),
         ("is the cosine better than a linear decay?", "adamw-cosine", "adamw-linear")],
        f"--model nfnet_f0 {AT_32}", FINE_TUNING, "train_vit", seeds=(3407,)),
    "pretraining": Suite(
        "How much do published weights help a convolutional network and a transformer?",
        {"resnet18": "--model timm/resnet18",
         "resnet18-pretrained": "--model timm/resnet18 --pretrained",
         "tinyvit_5m": "--model tinyvit_5m",
         "tinyvit_5m-pretrained": "--model tinyvit_5m --pretrained"},
        [("do published weights help?", "resnet18-pretrained", "resnet18"),
         ("do published weights help?", "tinyvit_5m-pretrained", "tinyvit_5m"),
         ("is the transformer better?", "tinyvit_5m", "resnet18"),
         ("is the transformer better?", "tinyvit_5m-pretrained", "resnet18-pretrained")],
        "--image-size 224 --epochs 30",
        "--batch-size 128 --optimizer adamw --lr 3e-4 --layer-decay 1 --weight-decay 0.05 "
        "--schedule cosine --augment random_resized_crop,rand_augment --mixup 0 --cutmix 0 "
        "--random-erasing 0 --label-smoothing 0.1 --clip-grad 1", "train_vit"),
    "vit-pretraining": Suite(
        "How far do transformers get with published weights, and from scratch?",
        {"vit_tiny-pretrained": "--model vit_tiny --image-size 224 --pretrained",
         "vit_tiny": "--model vit_tiny --image-size 224",
         "vit_custom": "--model vit_custom --image-size 32",
         "vit_small_data": "--model vit_small_data --image-size 32"},
        [("do published weights help?", "vit_tiny-pretrained", "vit_tiny"),
         ("do shifted patches and local attention help?", "vit_small_data", "vit_custom"),
         ("is the small one better from scratch?", "vit_small_data", "vit_tiny")],
        "--epochs 150", "--optimizer adamw --lr 1e-4 --batch-size 512 --layer-decay 1",
        "train_vit"),
    "resolution": Suite(
        "How much accuracy do smaller inputs cost a pretrained ViT-Tiny?",
        {f"{size}px": f"--image-size {size}" for size in (32, 64, 128, 224)},
        [("does the size matter?", "32px 64px 128px", "224px")],
        "--model vit_tiny --pretrained", script="train_vit"),
    "sota": Suite(
        "What do the three largest models need, and what do they reach?",
        for_each(LARGEST),
        [("is it better than EVA-02 large?", "eva_giant convnext_xxlarge", "eva02_large")],
        "--dataset cifar10 --pretrained --epochs 50",
        "--optimizer adamw --lr 1e-4 --batch-size 256 --layer-decay 1", "train_sota",
        seeds=(0,), ranked=True,
        afterwards=(
            "benchmark.py models --models eva02_large eva_giant --batch-size 512 "
            "--output {root}/eva",
            "benchmark.py models --models convnext_xxlarge --batch-size 256 "
            "--output {root}/convnext_xxlarge")),
}
# fmt: on

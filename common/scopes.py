"""What an argument of a training script concerns: the one table that says so.

identity     decides what a run computes: fixed on resume; another value is another experiment
execution    how it is computed: may change on resume, but the result may then not be bit-identical;
             with micro_batch, the statistics of batch norm are of other parts of a batch
location     where it is computed, its name and what it keeps: only device changes the result, and
             only its last bits
call         concerns one call of the script: never taken from --config
"""

_IDENTITY = """
    model model_arg pretrained weights freeze_backbone lora_rank layer_decay
    dataset image_size val_size limit_train limit_test skip_bad_images
    epochs batch_size optimizer lr momentum nesterov weight_decay schedule warmup_epochs final_lr
    label_smoothing ema_decay lookahead drop_path clip_grad accumulate progressive
    augment crop_padding crop_pixels jitter mixup cutmix mix_prob mix_per cutout
    random_erasing repeated_augment tta
    sync_bn seed eval_every eval_train patience
"""
_EXECUTION = "amp compile grad_checkpointing deterministic micro_batch ema_device fsdp"
_LOCATION = "device resident data_dir data_url tag curves save_every"
_CALL = "output_dir resume resume_previous config list_models doctor dry_run gpu_memory smoke"

SCOPES = (
    dict.fromkeys(_IDENTITY.split(), "identity")
    | dict.fromkeys(_EXECUTION.split(), "execution")
    | dict.fromkeys(_LOCATION.split(), "location")
    | dict.fromkeys(_CALL.split(), "call")
)


def with_scope(*scopes):
    """The names of the arguments with one of these scopes."""
    return {name for name, scope in SCOPES.items() if scope in scopes}


def flag(name):
    """The option of an argument: "batch_size" -> "--batch-size"."""
    return f"--{name.replace('_', '-')}"


def words(values):
    """Arguments by name as words of a command line."""
    result = []
    for name, value in values.items():
        for item in value if isinstance(value, list) else [value]:
            if isinstance(item, bool):
                result.append(flag(name if item else f"no_{name}"))
            elif str(item).startswith("-"):  # not an option
                result.append(f"{flag(name)}={item}")
            else:
                result += [flag(name), "auto" if item is None else str(item)]
    return result

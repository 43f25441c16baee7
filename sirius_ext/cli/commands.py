"""The commands: which arguments they take, and what is checked of these before anything else.

Importing torch and transformers takes seconds, for which nobody should wait who has asked for help or has mistyped an option. So
this module and those that it imports do without. A command is a function of its options: it checks what can be checked by then,
imports what it runs, and returns that.
"""

from __future__ import annotations

import argparse
import functools
import os
import sys

from ..config import DENSITY, SPARSITIES, SiriusConfig
from ..decoding.thresholds import LEAST_TOKENS, check_density
from ..evaluation.modes import NAMED_MODES, config_of
from ..evaluation.study import SETTINGS
from ..evaluation.tasks import TASKS, file_of
from ..extras import need
from ..loading import parse_size
from .arguments import (
    Commands,
    check_distinct,
    density,
    input_file,
    input_folder,
    input_text,
    integer,
    integer_in,
    key,
    not_empty,
    number,
    output_file,
    output_folder,
    output_text,
    period,
    read_text,
    reads,
    words,
)
from .options import (
    DEFAULTS,
    EVALUATION_PERIOD,
    TOKENS,
    Options,
    Run,
    add_command,
    add_decoding_options,
    add_device_option,
    add_memory_option,
    add_mode_options,
    add_sampling_options,
    add_setting,
    add_sparsity_options,
    add_weights_options,
    check_used,
    evaluation_config,
    mode_config,
    sampling_of,
    some_bytes,
)

API_KEY = "SIRIUS_API_KEY"  # in the environment


def add(commands: Commands) -> None:
    """Add them all, in the order in which help lists them."""
    _add_generate(commands)
    _add_chat(commands)
    _add_serve(commands)
    _add_calibrate(commands)
    _add_prepare(commands)
    _add_eval(commands)
    _add_report(commands)
    _add_study(commands)
    _add_analyze(commands)
    # For the list of commands alone: what stands after it goes to `lm_eval` unread.
    commands.add_parser("lm_eval", help="EleutherAI's harness with the model `sirius`; its own options follow")
    _add_demo(commands)
    _add_info(commands)


# ------------------------------------------------------------------------------------------------------------------------ texts


def _add_generate(commands: Commands) -> None:
    generate = add_command(
        commands, "generate", _generate, "decode one prompt, streaming the text", '--prompt "Name three colours." --chat'
    )
    group = generate.add_argument_group("prompt")
    prompt = group.add_mutually_exclusive_group(required=True)
    prompt.add_argument("--prompt", metavar="TEXT", type=not_empty, help="what the text goes on from")
    prompt.add_argument(
        "--prompt-file", metavar="FILE", type=input_text, help="read the prompt from a UTF-8 file; - is standard input"
    )
    group.add_argument("--chat", action="store_true", help="put the prompt into the model's chat template")
    add_mode_options(generate)
    add_sampling_options(generate)
    output = generate.add_argument_group("output")
    output.add_argument("--max-new-tokens", type=TOKENS, default=256, help="length of the text at most (default: %(default)s)")
    output.add_argument(
        "--stop", metavar="STRING", type=not_empty, action="append", help="end the text after this; may be given again"
    )
    _add_json(output, "write config, text, token ids and stats")


def _generate(options: argparse.Namespace) -> Run:
    config, sampling = mode_config(options), sampling_of(options)
    check_distinct(json=options.json, prompt_file=options.prompt_file, thresholds=getattr(options, "thresholds", None))
    prompt = options.prompt or read_text("prompt_file", options.prompt_file)
    from .generate import run

    return functools.partial(run, options, config, sampling, prompt)


def _add_json(parser: Options, what: str) -> None:
    purpose = f"{what}; - is standard output, and the text goes to standard error"
    parser.add_argument("--json", metavar="FILE", type=output_text, help=purpose)


def _add_chat(commands: Commands) -> None:
    chat = add_command(commands, "chat", _chat, "talk with a model in the terminal", '--weights q8 --system "Be brief."')
    chat.description = "Talk with a model. /help lists what else can be said; Ctrl-C ends an answer, Ctrl-D the conversation."
    group = chat.add_argument_group("conversation")
    group.add_argument("--system", metavar="TEXT", type=not_empty, help="a first message that says how to answer")
    purpose = "begin with a conversation: a JSON file as /save writes it, a list of objects with role and content"
    group.add_argument("--messages", metavar="FILE", type=input_file, help=purpose)
    purpose = "length of an answer at most (default: %(default)s)"
    group.add_argument("--max-new-tokens", type=TOKENS, default=1024, help=purpose)
    add_mode_options(chat)
    add_sampling_options(chat)


def _chat(options: argparse.Namespace) -> Run:
    config, sampling = mode_config(options), sampling_of(options)
    from .chat import run

    return functools.partial(run, options, config, sampling)


def _add_serve(commands: Commands) -> None:
    serve = add_command(
        commands, "serve", _serve, "serve a model to OpenAI's clients, with a page to chat", "--weights q8 --port 8000"
    )
    serve.description = (
        "OpenAI's /v1/chat/completions and /v1/completions, /v1/models, /health, /metrics, and at / a page. A request may have "
        "its own settings (`sirius`); the options here are what it goes by otherwise."
    )
    option = serve.add_argument_group("server").add_argument
    option("--host", default="127.0.0.1", help="to listen on; another than this machine's own needs an API key (%(default)s)")
    option("--port", type=integer_in(0, 65535), default=8000, help="0 takes a free one (default: %(default)s)")
    option("--api-key", metavar="KEY", type=key, help=f"that clients must show; better in the environment as {API_KEY}")
    option("--name", type=not_empty, help="of the model, for clients (default: that of --model, without its folder)")
    purpose = "texts that are decoded in turn (default: %(default)s)"
    option("--parallel", metavar="N", type=integer_in(1, 256), default=4, help=purpose)
    option("--queue", metavar="N", type=integer_in(0, 65536), default=64, help="texts that may wait (default: %(default)s)")
    purpose = "kept for prompts that begin as earlier ones did: 500M, 2G, ... (default: 1G)"
    option("--cache-memory", metavar="SIZE", type=reads(parse_size), default=1 << 30, help=purpose)
    purpose = (
        "use what was decoded, too, where a conversation goes on: less to read, but answers are then no longer, bit for bit, "
        "those that the prompt alone would get"
    )
    option("--reuse-decoded", action="store_true", help=purpose)
    purpose = "of an answer whose request does not say (default: %(default)s)"
    option("--max-tokens", type=TOKENS, default=1024, help=purpose)
    purpose = "of a request that does not say; 0 takes the likeliest tokens (default: %(default)s)"
    option("--temperature", type=number, default=0.0, help=purpose)
    option("--max-body", metavar="SIZE", type=some_bytes, default=4 << 20, help="of a request (default: 4M)")
    add_mode_options(serve)
    serve.set_defaults(sample=False)  # a request says


def _serve(options: argparse.Namespace) -> Run:
    for module in ("fastapi", "uvicorn", "prometheus_client"):
        need(module, "serve", "serve")
    from ..serving.guard import is_loopback

    if getattr(options, "accept", "") == "sample":
        raise ValueError("accept: expected threshold or match; requests with a temperature above 0 have sample by themselves")
    if not 0 <= options.temperature <= 2:
        raise ValueError(f"temperature: expected 0 to 2, got {options.temperature}")
    config = mode_config(options)
    api_key = options.api_key
    if api_key is None and API_KEY in os.environ:
        try:
            api_key = key(os.environ[API_KEY])
        except argparse.ArgumentTypeError as error:
            raise ValueError(f"{API_KEY}: {error}") from error
    if api_key is None and not is_loopback(options.host):
        raise ValueError(f"host: {options.host} can be reached from other machines; set --api-key or {API_KEY} first")
    from .serve import run

    return functools.partial(run, options, config, api_key)


# -------------------------------------------------------------------------------------------------------------------- to prepare


def _add_calibrate(commands: Commands) -> None:
    calibration = add_command(commands, "calibrate", _calibrate, "thresholds for fsparse, from a text", "--text FILE --out FILE")
    calibration.description = (
        "Per-layer thresholds for --sparsity fsparse. The last fifth of the text is held back to try them on."
    )
    calibration.add_argument("--text", metavar="FILE", type=input_text, required=True, help="UTF-8; - is standard input")
    calibration.add_argument(
        "--density", type=number, default=DENSITY, help="fraction of MLP neurons to keep (default: %(default)s)"
    )
    calibration.add_argument("--out", metavar="FILE", type=output_file, required=True, help="gets the thresholds")


def _calibrate(options: argparse.Namespace) -> Run:
    check_density(options.density)
    check_distinct(text=options.text, out=options.out)
    text = read_text("text", options.text)
    if (size := len(text.encode())) < LEAST_TOKENS:  # none of which is less than a byte
        raise ValueError(f"text: expected at least {LEAST_TOKENS} tokens, got {size} bytes")
    from .calibrate import run

    return functools.partial(run, options, text)


def _add_prepare(commands: Commands) -> None:
    prepare = commands.add_parser("prepare", help="files of a model that is larger than the memory")
    prepare.set_defaults(command=_prepare, parser=prepare)
    prepare.description = (
        "Writes a folder that is used as a model whose MLPs stay on the disk. If it is stopped, the same command goes on from "
        "where it was; a folder that is whole is checked, and mended if it is damaged."
    )
    purpose = "Hugging Face id, local folder or GGUF file"
    prepare.add_argument("model", metavar="MODEL", type=not_empty, help=purpose)
    purpose = "a new or an empty one, or one that this command has made of the same model"
    prepare.add_argument("--out", metavar="FOLDER", type=output_folder, required=True, help=purpose)
    add_weights_options(prepare)


def _prepare(options: argparse.Namespace) -> Run:
    from .prepare import run

    return functools.partial(run, options)


# ------------------------------------------------------------------------------------------------------------------- evaluations


def _add_eval(commands: Commands) -> None:
    example = "--task gsm8k --limit 50 --modes full,sirius-c --out gsm8k.jsonl"
    suite = add_command(commands, "eval", _eval, "accuracy of a task in several modes, on the same items", example)
    suite.description = "Few-shot, generated answers. Each result goes to a file of JSON lines as soon as it is known."
    _add_task_options(suite)
    output = suite.add_argument_group("output")
    output.add_argument("--out", metavar="FILE", type=output_file, required=True, help="gets the results")
    output.add_argument("--resume", action="store_true", help="go on with what --out holds")
    ways = _add_ways(suite)
    ways.add_argument("--shard", type=_shard, default="1/1", help="i/k: the i-th of k parts of the items (default: %(default)s)")
    decoding = suite.add_argument_group("decoding")
    decoding.add_argument(
        "--modes",
        type=words,
        default="full,csparse,fsparse,sirius-c,sirius-f",
        help=f"of {', '.join(NAMED_MODES)}, also with settings of their own, as in sirius-c:period=8 (default: %(default)s)",
    )
    add_decoding_options(decoding, period_default=EVALUATION_PERIOD)


def _eval(options: argparse.Namespace) -> Run:
    _check_used(options)
    _check_data(options)
    base = evaluation_config(options)
    for mode in options.modes:
        config_of(mode, base)
    from .evaluation import run_eval

    return functools.partial(run_eval, options)


def _add_report(commands: Commands) -> None:
    table = commands.add_parser("report", help="the table of one or several result files of eval: those of shards make one")
    table.set_defaults(command=_report, parser=table)
    table.add_argument("files", metavar="FILE", nargs="+", type=input_file)
    table.add_argument("--out", metavar="FILE", type=output_file, help="write the records of all files into one")


def _report(options: argparse.Namespace) -> Run:
    from .report import run

    return functools.partial(run, options)


def _add_study(commands: Commands) -> None:
    purpose, example = (
        "accuracy and effective density against one setting, with a plot",
        "--what period --task gsm8k --out FOLDER",
    )
    study = add_command(commands, "study", _study, purpose, example)
    study.description = (
        "Decodes the same items with each value of a setting, and by the full model. What --out holds already is not done again."
    )
    group = study.add_argument_group("what is studied")
    group.add_argument("--what", choices=SETTINGS, required=True, help="the setting that varies; the options below fix the rest")
    group.add_argument("--values", type=words, help="of the setting, with commas between them")
    modes = [mode for mode in NAMED_MODES if mode.startswith("sirius")]
    group.add_argument("--mode", choices=modes, default="sirius-c", help="what is studied (default: %(default)s)")
    _add_task_options(study)
    _add_ways(study)
    purpose = "gets results, plot and table"
    study.add_argument_group("output").add_argument("--out", metavar="FOLDER", type=output_folder, required=True, help=purpose)
    add_decoding_options(study.add_argument_group("decoding"), period_default=EVALUATION_PERIOD)


def _study(options: argparse.Namespace) -> Run:
    setting = SETTINGS[options.what]
    try:
        values = [setting.parse(text) for text in options.values] if options.values else setting.values
    except ValueError as error:
        raise ValueError(f"values: expected numbers for {options.what}, got {','.join(options.values)}") from error
    # That of the other studies in the folder, which share the text that has it.
    base = getattr(options, setting.field, values[0])
    if base not in values:
        known = ", ".join(map(str, values))
        raise ValueError(f"{setting.field}: --what {options.what} varies it; expected one of {known}, got {base}")
    _check_used(options)
    _check_data(options)
    need("matplotlib", "eval", "the plot")
    from .evaluation import run_study

    return functools.partial(run_study, options, values)


def _add_analyze(commands: Commands) -> None:
    purpose = "which tokens of the sparse model the full one rejects, and how many corrections bring the answer back"
    analysis = add_command(commands, "analyze", _analyze, purpose, "--task gsm8k --limit 20 --out transcripts.html")
    analysis.description = (
        "Decodes items with S alone and marks the tokens that F rejects. Then an oracle replaces the first of them by F's own "
        "token, S goes on, and so forth until the answer is right or nothing is rejected."
    )
    _add_task_options(analysis).add_argument("--items", type=words, help="ids, in place of --skip and --limit")
    decoding = analysis.add_argument_group("decoding")
    decoding.add_argument("--mode", choices=SPARSITIES, default=DEFAULTS.sparsity, help="the sparse model (default: %(default)s)")
    add_sparsity_options(decoding)
    output = analysis.add_argument_group("output")
    output.add_argument("--out", metavar="FILE", type=output_file, required=True, help="the coloured transcripts, as HTML")
    _add_json(output, "the same as JSON: a summary, and a record per item")


def _analyze(options: argparse.Namespace) -> Run:
    _check_data(options)
    from .evaluation import run_analyze

    return functools.partial(run_analyze, options)


def lm_eval(arguments: list[str]) -> Run:
    """lm-eval's own command, with the model `sirius` among its models."""
    need("lm_eval", "lm-eval", "lm_eval")
    need("sirius_ext.integrations.lm_eval", "lm-eval", "lm_eval")
    command = need("lm_eval.__main__", "lm-eval", "lm_eval").cli_evaluate

    def run() -> int:
        before, sys.argv = sys.argv, ["lm_eval", *arguments]
        try:
            command()
        finally:
            sys.argv = before
        return 0

    return run


def _add_task_options(parser: argparse.ArgumentParser) -> Options:
    """Returns their group."""
    group = parser.add_argument_group("task")
    group.add_argument("--task", choices=TASKS, required=True, help="whose items are decoded")
    group.add_argument(
        "--data", metavar="DIR", type=input_folder, help="folder of the tasks' files (default: the Hugging Face hub)"
    )
    add_setting(
        group, "--skip", "items left out at the beginning, such as settings were chosen on", 0, metavar="COUNT", type=integer
    )
    add_setting(group, "--limit", "items at most", metavar="COUNT", type=integer)
    group.add_argument("--shots", type=integer, help="examples in the prompt (default: 5, or as many as there are)")
    return group


def _check_data(options: argparse.Namespace) -> None:
    if options.data is not None:
        file_of(TASKS[options.task], options.data)


def _add_ways(parser: argparse.ArgumentParser) -> Options:
    """Returns their group."""
    group = parser.add_argument_group("processes")
    add = group.add_argument
    add("--jobs", type=integer, default=1, help="processes, each with a model of its own (default: %(default)s)")
    add("--ray", action="store_true", help="the jobs run on the machines of a Ray cluster")
    add(
        "--batch",
        type=integer,
        default=1,
        help="items side by side: much faster, but nothing is timed then (default: %(default)s)",
    )
    return group


@reads
def _shard(text: str) -> tuple[int, int]:
    try:
        index, count = (int(part) for part in text.split("/"))
    except ValueError:
        index, count = 0, 0
    if not 1 <= index <= count:
        raise ValueError(f"expected i/k with 1 <= i <= k, got {text!r}")
    return index, count


def _check_used(options: argparse.Namespace) -> None:
    """Not mode by mode: the settings are those of the results file, where other modes may join."""
    accept = getattr(options, "accept", DEFAULTS.accept)
    check_used(options, SiriusConfig(sparsity="fsparse", accept=accept).used, f"--accept {accept}")


# ---------------------------------------------------------------------------------------------------------------------- to look


def _add_demo(commands: Commands) -> None:
    demo = add_command(commands, "demo", _demo, "transformers, Full, CSparse and Sirius side by side")
    demo.set_defaults(weights="q8")
    demo.add_argument(
        "--density", type=density, default=DEFAULTS.density, help="fraction of MLP neurons kept, or auto (default: %(default)s)"
    )
    demo.add_argument(
        "--period",
        type=period,
        default=DEFAULTS.period,
        help="tokens that one full pass verifies, or auto (default: %(default)s)",
    )
    purpose = "length of each text at most (default: %(default)s)"
    demo.add_argument("--max-new-tokens", type=TOKENS, default=48, help=purpose)


def _demo(options: argparse.Namespace) -> Run:
    config = SiriusConfig(density=options.density, period=options.period)
    from .demo import run

    return functools.partial(run, options, config)


def _add_info(commands: Commands) -> None:
    info = commands.add_parser("info", help="version, backends, instruction sets, devices; or what of a model stays in memory")
    info.set_defaults(command=_info, parser=info)
    info.description = (
        "Version, backends, instruction sets and devices. With --model: what of it would stay in memory, what a period would "
        "read from the disk, and what tokens are predicted to take on the CPU by default settings; with --device cuda what of a "
        "GPU's memory, and what a period would move there from the host's. Nothing is loaded or prepared."
    )
    info.add_argument("--model", type=not_empty, help="Hugging Face id, local folder or GGUF file")
    add_device_option(info, "cpu")
    add_weights_options(info)
    add_memory_option(info)


def _info(options: argparse.Namespace) -> Run:
    for name in ("device", "weights", "dtype", "memory"):
        if options.model is None and getattr(options, name) != options.parser.get_default(name):
            raise ValueError(f"{name}: it needs --model, of which it says something")
    from .info import run

    return functools.partial(run, options)

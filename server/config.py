"""The one settings object: flags first, then RIVULET_* variables, then defaults; parsed once, then frozen.

The only place that reads the environment.
"""

import json
import re
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Annotated, Literal, TypeVar

from pydantic import (
    AliasChoices,
    ByteSize,
    Field,
    SecretStr,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_settings import BaseSettings, CliPositionalArg, NoDecode, SettingsConfigDict, SettingsError

DEFAULT_MODEL = "smollm2-135m"
EXPORTER = "opentelemetry-exporter-otlp-proto-http"
"""What the extra `otel` brings; looked for by its name, for importing it takes time."""

Seconds = Annotated[float, Field(gt=0, le=86_400, allow_inf_nan=False)]

Settings = TypeVar("Settings", bound="CommandSettings")


class CommandSettings(BaseSettings):
    """How each command's settings are read."""

    model_config = SettingsConfigDict(
        env_prefix="RIVULET_",
        frozen=True,
        extra="ignore",
        cli_kebab_case=True,
        cli_implicit_flags=True,
        cli_avoid_json=True,
        cli_exit_on_error=False,
        cli_hide_none_type=True,
        protected_namespaces=(),
    )


class ModelSettings(CommandSettings):
    """Which model, and what it may use of the machine."""

    model: str = Field(
        DEFAULT_MODEL,
        description=f"alias {DEFAULT_MODEL}, folder with config.json and safetensors, .gguf or .pth file, "
        "or hub id",
    )
    revision: str | None = Field(None, description="branch, tag or commit of a hub id")
    tokenizer: Path | None = Field(
        None,
        description="folder with tokenizer.json, or that file; unset: the model's own, or the one beside it",
    )
    config_fields: Annotated[tuple[tuple[str, str | int | float | bool], ...], NoDecode] = Field(
        (),
        description="NAME=VALUE of a MiniMind's config.json, where a bare .pth does not say it "
        "(num_attention_heads=8); repeat it, or separate several with commas",
    )
    cache_folder: Path = Field(
        Path("~/.cache/rivulet"), description="where the default model is kept once it is downloaded"
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto", description="auto takes a CUDA GPU if there is one"
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="type of plain weights; any but auto takes torch's ops on a CPU"
    )
    kernels: Literal["auto", "amx", "avx512", "avx512_vnni", "avx2", "torch"] = Field(
        "auto", description="of a CPU: our native ones by the processor's features, or torch's ops"
    )
    quantize: Literal["auto", "q8", "q4", "none"] = Field(
        "auto", description="bits of plain weights on a CPU; auto is q8, none keeps them, as bfloat16"
    )
    threads: Annotated[int, Field(ge=1, le=1024)] | None = Field(
        None, description="threads of a CPU; unset: the cores this process may use"
    )
    kv_cache_tokens: Annotated[int, Field(ge=1)] | None = Field(
        None, description="size of the KV cache in tokens; unset: what fits"
    )
    kv_cache_memory: Annotated[ByteSize, Field(ge=1)] | None = Field(
        None, description="size of the KV cache in bytes, or with a unit such as 2GiB; unset: what fits"
    )
    max_model_len: Annotated[int, Field(ge=2)] | None = Field(
        None, description="most tokens of prompt and output together; unset: the model's own limit"
    )
    max_running: int = Field(64, ge=1, le=4096, description="requests computed side by side, at most")
    token_budget: int = Field(
        512, ge=1, description="rows (prompt and output tokens) that one step computes, at most"
    )
    speculate: Literal["auto", "off", "prompt-lookup"] = Field(
        "auto",
        description="guess what follows from the text itself, to get several tokens a step where that pays; "
        "auto does on the native kernels, where a row has the same bits with and without guesses beside it",
    )
    draft_model: str | None = Field(
        None,
        description="smaller model of the same vocabulary that guesses what follows; named as --model is",
    )
    speculative_tokens: int = Field(
        8, ge=1, le=64, description="tokens that either of them guesses ahead, at most"
    )
    prefix_cache: bool = Field(True, description="reuse the keys and values of prompts that begin alike")
    step_timeout: Seconds = Field(
        120, description="seconds after which a step of the model counts as stuck and the server ends"
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        "info", description="least level that is logged"
    )
    log_format: Literal["text", "json"] = Field(
        "text", description="one line of text or one JSON object an event"
    )

    @field_validator("cache_folder")
    @classmethod
    def _expand_home(cls, folder: Path) -> Path:
        return folder.expanduser()

    @field_validator("config_fields", mode="before")
    @classmethod
    def _split_fields(cls, given: object) -> object:
        fields = _pairs(given, "NAME=VALUE")
        return given if fields is None else tuple((name, _number(value)) for name, value in fields.items())

    @field_validator("tokenizer")
    @classmethod
    def _expand_tokenizer(cls, tokenizer: Path | None) -> Path | None:
        return None if tokenizer is None else tokenizer.expanduser()

    @model_validator(mode="after")
    def _check_together(self) -> "ModelSettings":
        if self.kv_cache_tokens is not None and self.kv_cache_memory is not None:
            raise ValueError("give kv_cache_tokens or kv_cache_memory, not both")
        if self.speculate == "prompt-lookup" and self.draft_model is not None:
            raise ValueError("speculate and draft_model both guess what follows: give one of them")
        if self.token_budget < self.max_running:
            raise ValueError(
                f"token_budget ({self.token_budget}) is below max_running ({self.max_running}): "
                "each running request needs one row a step"
            )
        return self


class ServeSettings(ModelSettings):
    """Serve one model over HTTP: TGI's /generate and OpenAI's /v1."""

    served_model_name: str | None = Field(
        None, description="name of the model on /v1; unset: the alias, or the folder's or file's name"
    )
    served_model_aliases: Annotated[tuple[str, ...], NoDecode] = Field(
        (), description="more names of the model on /v1, with commas between them"
    )
    lora: Annotated[tuple[tuple[str, Path], ...], NoDecode] = Field(
        (),
        description="NAME=FOLDER of a PEFT LoRA, requests choose it by its name; repeat it, or separate "
        "several with commas",
    )
    host: str = Field("127.0.0.1", description="address to listen on; 0.0.0.0 is every interface")
    port: int = Field(8000, ge=0, le=65535, description="TCP port; 0 takes a free one")
    api_keys: Annotated[tuple[SecretStr, ...], NoDecode] = Field(
        (),
        description="keys that open the server, with commas between them; none: open to all. Other users see "
        "a flag's value in the list of processes: rather use the variable, or --api-keys-file",
    )
    api_keys_file: Path | None = Field(
        None, description="file of more keys: `KEY` or `NAME: KEY` a line, # begins a comment"
    )
    cors_origins: Annotated[tuple[str, ...], NoDecode] = Field(
        (), description="origins whose pages may call (https://a.org), with commas between them; * is any"
    )
    tls_certificate: Path | None = Field(None, description="PEM file with the certificate and its chain")
    tls_key: Path | None = Field(None, description="PEM file with the certificate's private key")
    max_waiting: int = Field(128, ge=0, description="requests that may wait for a place; more get 429")
    max_waiting_tokens: int = Field(
        262_144, ge=1, description="prompt tokens that may wait; more get 429, unless nothing waits"
    )
    max_best_of: int = Field(2, ge=1, le=64, description="candidates of one call on TGI's routes, at most")
    max_stop_sequences: int = Field(4, ge=0, le=1024, description="stop strings on TGI's routes, at most")
    max_top_n_tokens: int = Field(
        5, ge=0, le=1000, description="likeliest tokens told at each place on TGI's routes, at most"
    )

    max_body_bytes: int = Field(2_000_000, ge=1024, description="of a request's body, at most")
    max_connections: int = Field(1000, ge=1, description="connections at once; more get 503 and are closed")
    header_timeout: Seconds = Field(10, description="seconds from connecting to the end of a request's head")
    body_timeout: Seconds = Field(30, description="seconds from the head to the end of a request's body")
    idle_timeout: Seconds = Field(75, description="seconds that a connection may rest between requests")
    send_timeout: Seconds = Field(30, description="seconds that a client may leave what is sent unread")
    shutdown_timeout: Seconds = Field(
        30, description="seconds that running requests get to finish once the server is told to end"
    )
    log_prompts: bool = Field(False, description="log what clients send and get; off, no text is ever logged")
    otlp_endpoint: str | None = Field(
        None,
        description="address of an OpenTelemetry collector that takes OTLP over HTTP, such as "
        "http://127.0.0.1:4318, without /v1/traces; needs rivulet[otel]",
    )

    @model_validator(mode="after")
    def _check_tls(self) -> "ServeSettings":
        if (self.tls_certificate is None) != (self.tls_key is None):
            raise ValueError("tls_certificate and tls_key go together: give both or neither")
        if self.tls_certificate is not None and self.tls_key is not None:
            _check_pair(self.tls_certificate, self.tls_key)
        return self

    @field_validator("served_model_aliases", "api_keys", "cors_origins", mode="before")
    @classmethod
    def _split_names(cls, names: object) -> object:
        parts = names.split(",") if isinstance(names, str) else names
        return tuple(name for part in parts if (name := part.strip())) if isinstance(parts, list) else parts

    @field_validator("lora", mode="before")
    @classmethod
    def _split_adapters(cls, given: object) -> object:
        folders = _pairs(given, "NAME=FOLDER")
        if folders is None:
            return given
        return tuple((name, Path(folder).expanduser()) for name, folder in folders.items())

    @field_validator("otlp_endpoint")
    @classmethod
    def _check_collector(cls, address: str | None) -> str | None:
        if address is None:
            return None
        if not re.fullmatch(r"https?://[^/?#\s]+(/[^?#\s]*)?", address):
            raise ValueError("begins with http:// or https://, and has a host")
        try:
            distribution(EXPORTER)
        except PackageNotFoundError:
            raise ValueError("traces need more packages: pip install 'rivulet[otel]'") from None
        return address.rstrip("/").removesuffix("/v1/traces")

    @field_validator("cors_origins")
    @classmethod
    def _check_origins(cls, origins: tuple[str, ...]) -> tuple[str, ...]:
        for origin in origins:
            if origin != "*" and not re.fullmatch(r"[a-z][a-z0-9+.-]*://[^/?#@\sA-Z]+", origin):
                raise ValueError(
                    f"`{origin}` is no origin: scheme://host or scheme://host:port, in lower case"
                )
        return origins


def _pairs(given: object, form: str) -> dict[str, str] | None:
    """Read what a flag of NAME=SOMETHING was given, once or repeated or with commas between (ValueError).

    None if it is no text, which is a value in code.
    """
    if not isinstance(given, (str, list)):
        return None
    parts = [part for text in ([given] if isinstance(given, str) else given) for part in text.split(",")]
    pairs: dict[str, str] = {}
    for part in filter(None, map(str.strip, parts)):
        name, _, value = (word.strip() for word in part.partition("="))
        if not name or not value:
            raise ValueError(f"`{part}` is not {form}")
        if name in pairs:
            raise ValueError(f"`{name}` is given twice")
        pairs[name] = value
    return pairs


def _number(text: str) -> str | int | float | bool:
    """A number, true or false as JSON has them; anything else is a word."""
    try:
        value = json.loads(text)
    except ValueError:
        return text
    return value if isinstance(value, (int, float)) else text


def _check_pair(certificate: Path, key: Path) -> None:
    """Whether TLS can be served with these files (ValueError), which is told before a model is loaded."""
    import ssl  # what most starts do without

    for name, file in (("tls_certificate", certificate), ("tls_key", key)):
        try:
            file.read_bytes()
        except OSError as error:
            raise ValueError(f"{name}: cannot read {file}: {error.strerror}") from None
    try:
        # A key with a passphrase would ask the terminal for it.
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate, key, password="")
    except ssl.SSLError as error:
        if error.reason == "KEY_VALUES_MISMATCH":
            raise ValueError(f"the key in {key} is not that of the certificate in {certificate}") from None
        raise ValueError(
            f"{certificate} and {key} are not a certificate and its key, both in PEM and without a passphrase"
        ) from None


class GenerateSettings(ModelSettings):
    """Stream one answer to the terminal."""

    text: CliPositionalArg[str] = Field(description="the prompt")
    raw: bool = Field(False, description="continue the text as it is, without the model's chat template")
    max_tokens: int = Field(256, ge=1, description="output tokens, at most")
    temperature: float = Field(
        0.0, ge=0, le=100, allow_inf_nan=False, description="0 takes the likeliest token"
    )
    seed: int = Field(0, description="the same seed gives the same text")


class InspectSettings(ModelSettings):
    """Tell what a model is, what it takes and how fast it should run here."""

    model: CliPositionalArg[str] = Field(description="what --model of `rivulet serve` takes")
    json_output: bool = Field(
        False, validation_alias=AliasChoices("json", "RIVULET_JSON"), description="print one JSON object"
    )


class BenchSettings(CommandSettings):
    """Load a server with streams and measure it; its variables begin with RIVULET_BENCH_."""

    model_config = SettingsConfigDict(env_prefix="RIVULET_BENCH_")

    url: str = Field("http://127.0.0.1:8000", description="address of the server, without /v1")
    api: Literal["auto", "openai", "tgi"] = Field(
        "auto",
        description="/v1/completions or /generate_stream; auto is openai where /v1/models answers",
    )
    model: str | None = Field(None, description="name on /v1; unset: the first of /v1/models")
    clients: int = Field(1, ge=1, le=4096, description="streams side by side")
    requests: Annotated[int, Field(ge=1, le=1_000_000)] | None = Field(
        None, description="measured requests in all; unset: two a client, at least eight"
    )
    warmup: int = Field(1, ge=0, le=1_000_000, description="requests before these, not measured")
    prompt_tokens: int = Field(
        128, ge=1, le=1_000_000, description="tokens in: random words, calibrated by the server's own count"
    )
    output_tokens: int = Field(64, ge=1, le=1_000_000, description="tokens out, the end of text ignored")
    timeout: float = Field(
        600.0, gt=0, allow_inf_nan=False, description="seconds that everything together may take"
    )
    plot: Path | None = Field(None, description="SVG file for the distributions of TTFT and gaps")

    @field_validator("url")
    @classmethod
    def _check_url(cls, url: str) -> str:
        if not url.startswith(("http://", "https://")):
            raise ValueError("begins with http:// or https://")
        return url.rstrip("/").removesuffix("/v1")


class InvalidSettings(Exception):
    """A flag or variable that cannot be; its text is one line a mistake."""


def parse_settings(kind: type[Settings], arguments: Sequence[str], program: str) -> Settings:
    """Flags, environment and defaults -> the settings (InvalidSettings; SystemExit for --help)."""
    try:
        return kind(_cli_parse_args=list(arguments), _cli_prog_name=program)
    except SettingsError as error:
        raise InvalidSettings(str(error).removeprefix("error parsing CLI: ")) from None
    except ValidationError as error:
        lines = [
            f"{'.'.join(map(str, fault['loc'])) or 'settings'}: {fault['msg'].removeprefix('Value error, ')}"
            for fault in error.errors(include_url=False, include_input=False)
        ]
        raise InvalidSettings("\n".join(lines)) from None

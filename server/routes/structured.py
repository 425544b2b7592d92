"""What an answer must match, as OpenAI (`response_format`) and vLLM (`structured_outputs`) ask for it."""

import json
from typing import Annotated, Any, Literal

from pydantic import Field

from server.conversation import Structure
from server.errors import VALIDATION, RequestError
from server.routes.fields import Body, Text, Unsupported
from server.text.grammar import GrammarSpec

MAX_OPTIONS = 1000

Schema = dict[str, Any]


class SchemaFormat(Body):
    """A named JSON schema."""

    name: Text | None = Field(None, description="a label")
    description: Text | None = Field(None, description="a label")
    schema_: Schema = Field(alias="schema", description="a JSON schema")
    strict: bool | None = Field(None, description="the schema holds in any case")


class ResponseFormat(Body):
    """The form of an answer; the model is not told, so the prompt should tell it."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: SchemaFormat | None = Field(None, description="with type json_schema")

    def spec(self) -> GrammarSpec | None:
        """Which grammar it asks for (RequestError)."""
        if self.type == "json_schema":
            if self.json_schema is None:
                place = "response_format.json_schema"
                raise RequestError(VALIDATION, f"`{place}`: Field required", param=place)
            text = schema_text(self.json_schema.schema_, "response_format.json_schema.schema")
            return GrammarSpec("json_schema", text)
        if self.json_schema is not None:
            message = "`response_format.json_schema` needs `type` to be json_schema"
            raise RequestError(VALIDATION, message, param="response_format.json_schema")
        return GrammarSpec("json_object") if self.type == "json_object" else None


class StructuredOutputs(Body):
    """What an answer must match: exactly one of these."""

    json_: Schema | Text | None = Field(None, alias="json", description="a JSON schema, as object or text")
    json_object: bool | None = Field(None, description="true: any JSON object")
    regex: Text | None = Field(None, description="a regular expression for the whole answer")
    choice: Annotated[list[Text], Field(min_length=1, max_length=MAX_OPTIONS, fail_fast=True)] | None = Field(
        None, description="one of these texts"
    )
    grammar: Text | None = Field(None, description="a Lark grammar with a rule `start`")
    structural_tag: Unsupported = None
    whitespace_pattern: Unsupported = None
    disable_fallback: Unsupported = None
    disable_any_whitespace: Unsupported = None
    disable_additional_properties: Unsupported = None

    def spec(self) -> GrammarSpec:
        """Which grammar it asks for (RequestError)."""
        off = (False,)
        self.refuse(
            {
                "structural_tag": (),
                "whitespace_pattern": (),
                "disable_fallback": off,
                "disable_any_whitespace": off,
                "disable_additional_properties": off,
            }
        )
        asked = {
            "json": self.json_,
            "json_object": self.json_object or None,
            "regex": self.regex,
            "choice": self.choice,
            "grammar": self.grammar,
        }
        given = [name for name, value in asked.items() if value is not None]
        if len(given) != 1:
            message = f"`structured_outputs` needs exactly one of {', '.join(asked)}"
            raise RequestError(VALIDATION, message, param="structured_outputs")
        match given[0]:
            case "json":
                return GrammarSpec("json_schema", schema_text(self.json_, "structured_outputs.json"))
            case "json_object":
                return GrammarSpec("json_object")
            case "choice":
                return GrammarSpec("choice", json.dumps(self.choice, ensure_ascii=False))
            case "grammar":
                return GrammarSpec("lark", self.grammar or "")
        return GrammarSpec("regex", self.regex or "")


def read_structure(format: ResponseFormat | None, outputs: StructuredOutputs | None) -> Structure | None:
    """What the two fields together ask for (RequestError)."""
    spec = None if format is None else format.spec()
    if outputs is None:
        return None if spec is None else Structure(spec, "response_format")
    if spec is not None:
        message = "give `response_format` or `structured_outputs`, not both"
        raise RequestError(VALIDATION, message, param="structured_outputs")
    return Structure(outputs.spec(), "structured_outputs")


def schema_text(schema: object, field: str) -> str:
    """A schema as JSON; one that is text already is read by the compiler (RequestError)."""
    try:
        text = schema if isinstance(schema, str) else json.dumps(schema, ensure_ascii=False, allow_nan=False)
        text.encode()
    except (ValueError, RecursionError):
        raise RequestError(VALIDATION, f"`{field}` is not valid JSON", param=field) from None
    return text

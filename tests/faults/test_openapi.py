"""The API against its own OpenAPI document: what fits the document, and what nearly does, is answered as it says.

schemathesis draws the requests from the document that a running API serves; a real teacher scores what is sound. No
answer may be a server error, but 503 where it is documented; status, media type, headers and body must be documented.
"""

from __future__ import annotations

import os
from collections import Counter

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import GenerationMode
from schemathesis.schemas import APIOperation, BaseSchema
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from tests.support.api import Api
from vaopd_api.app import create_app
from vaopd_api.teachers import Teachers

EXAMPLES = int(os.environ.get("VAOPD_OPENAPI_EXAMPLES", "25"))
"""Of each route, of requests that fit and of requests that don't."""
CHECKS = [content_type_conformance, response_headers_conformance, response_schema_conformance, status_code_conformance]
_PATHS = create_app(teachers=Teachers([], options={})).openapi()["paths"]
ROUTES = [(method.upper(), path) for path, methods in _PATHS.items() for method in methods]
WITH_A_BODY = [(method, path) for method, path in ROUTES if "requestBody" in _PATHS[path][method.lower()]]


@pytest.fixture(scope="module")
def document(api: Api) -> BaseSchema:
    document = schemathesis.openapi.from_dict(api.http.get("/openapi.json").raise_for_status().json())
    document.config.update(base_url=str(api.http.base_url))
    return document


def statuses(operation: APIOperation, mode: GenerationMode) -> Counter[int]:
    """Of the requests that were drawn; raises when an answer is not as the document says."""
    found: Counter[int] = Counter()

    @settings(
        max_examples=EXAMPLES,
        deadline=None,
        database=None,
        derandomize=EXAMPLES <= 25,  # the suite repeats itself; a longer search looks elsewhere each time
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=operation.as_strategy(generation_mode=mode))
    def ask(case: schemathesis.Case) -> None:
        answer = case.call()
        case.validate_response(answer, checks=CHECKS)
        assert answer.status_code < 500 or answer.status_code == 503, answer.text
        found[answer.status_code] += 1

    ask()
    return found


@pytest.mark.parametrize(("method", "path"), ROUTES)
def test_what_fits_the_document_is_answered_as_it_says(api: Api, document: BaseSchema, method: str, path: str) -> None:
    before = api.known_answer()
    assert statuses(document[path][method], GenerationMode.POSITIVE)
    assert api.process.poll() is None
    assert api.known_answer() == before


@pytest.mark.parametrize(("method", "path"), WITH_A_BODY)
def test_what_does_not_fit_is_refused_as_the_document_says(
    api: Api, document: BaseSchema, method: str, path: str
) -> None:
    before = api.known_answer()
    assert statuses(document[path][method], GenerationMode.NEGATIVE)
    assert api.process.poll() is None
    assert api.known_answer() == before

"""Lets `lm-eval` score texts over /v1/completions: BASE_URL says where the server is.

EXPECTED is a JSON list of {"context", "continuation", "logprobs"}: the log-probabilities of the
continuation's tokens as `pontoon score` gives them. The sums must be equal to the last bit. Only
lm-eval's own client of OpenAI's completions is used, which needs a tenth of its dependencies.
Exits with 77 if it is not installed.
"""

import json
import os
import sys

try:
    from lm_eval.api.instance import Instance
    from lm_eval.models.openai_completions import LocalCompletionsAPI
except (ImportError, NameError):
    sys.exit(77)

os.environ["OPENAI_API_KEY"] = "secret"
url = os.environ["BASE_URL"] + "/v1/completions"
common = {"model": os.environ["MODEL"], "base_url": url, "auth_token": "secret", "max_length": 512}
with open(os.environ["EXPECTED"], encoding="utf-8") as file:
    expected = json.load(file)


def instances(kind, arguments):
    return [
        Instance(request_type=kind, doc={}, arguments=argument, idx=at)
        for at, argument in enumerate(arguments)
    ]


pairs = [(case["context"], case["continuation"]) for case in expected]
for more in ({"batch_size": 1}, {"batch_size": 4}, {"num_concurrent": 4}):
    # The tokenizer is the server's own, found by its endpoints; prompts go as token ids.
    scorer = LocalCompletionsAPI(**common, **more)
    assert scorer.tokenizer_backend == "remote", scorer.tokenizer_backend
    told = scorer.loglikelihood(instances("loglikelihood", pairs))
    for case, (logprob, _) in zip(expected, told, strict=True):
        assert logprob == sum(case["logprobs"]), (more, case, logprob)

texts = [(pair[0] + pair[1],) for pair in pairs]
rolling = scorer.loglikelihood_rolling(instances("loglikelihood_rolling", texts))
assert all(value < 0 for value in rolling), rolling
asked = instances("generate_until", [("one and", {"until": ["\n"], "max_gen_toks": 8})])
assert isinstance(scorer.generate_until(asked)[0], str)
print("lm-eval is content")

#!/usr/bin/env bash
# Lets schemathesis ask everything that /openapi.json describes: BASE_URL says where the server is,
# SCHEMATHESIS which program to run. Exits with 77 if it is not installed.
set -euo pipefail
program=${SCHEMATHESIS:-schemathesis}
command -v "$program" >/dev/null || exit 77
# That every request which fits the schema is taken is no promise a schema can make: a prompt may
# be longer than the context, a tool's choice may name none of the tools.
exec "$program" run "$BASE_URL/openapi.json" -H "Authorization: Bearer secret" \
  --checks all --exclude-checks positive_data_acceptance \
  --phases examples,coverage,fuzzing,stateful --max-examples "${EXAMPLES:-10}" \
  --seed "${SEED:-1}" --generation-database none --request-timeout 30 --no-color

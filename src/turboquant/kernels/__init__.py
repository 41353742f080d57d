"""The waist: a few ops with one signature in every backend. `ops` chooses the backend, `reference` is the oracle."""

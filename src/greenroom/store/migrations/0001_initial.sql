-- One table a kind of record. `data` is the record as JSON, as the API shows it (fields with their default left out); the
-- columns before it repeat what rows are found by. Without a rowid, so that finding a row by its key is one descent and an
-- index entry carries the key, in whose order lists are given.

CREATE TABLE actors (
    pk TEXT PRIMARY KEY,  -- namespace/name
    state TEXT NOT NULL,
    worker TEXT NOT NULL,
    template TEXT NOT NULL,
    uid TEXT NOT NULL,
    data TEXT NOT NULL
) STRICT, WITHOUT ROWID;
CREATE INDEX actors_state ON actors (state);
CREATE INDEX actors_worker ON actors (worker);
CREATE INDEX actors_template ON actors (template);
CREATE INDEX actors_uid ON actors (uid);

CREATE TABLE templates (
    pk TEXT PRIMARY KEY,  -- namespace/name
    state TEXT NOT NULL,
    data TEXT NOT NULL
) STRICT, WITHOUT ROWID;
CREATE INDEX templates_state ON templates (state);

CREATE TABLE pools (
    pk TEXT PRIMARY KEY,  -- name
    data TEXT NOT NULL
) STRICT, WITHOUT ROWID;

CREATE TABLE workers (
    pk TEXT PRIMARY KEY,  -- name
    pool TEXT NOT NULL,
    state TEXT NOT NULL,
    data TEXT NOT NULL
) STRICT, WITHOUT ROWID;
CREATE INDEX workers_pool ON workers (pool);
CREATE INDEX workers_state ON workers (state);

CREATE TABLE snapshots (
    pk TEXT PRIMARY KEY,  -- id
    actor_uid TEXT NOT NULL,
    namespace TEXT NOT NULL,
    state TEXT NOT NULL,
    template TEXT NOT NULL,
    data TEXT NOT NULL
) STRICT, WITHOUT ROWID;
CREATE INDEX snapshots_actor_uid ON snapshots (actor_uid);
CREATE INDEX snapshots_namespace ON snapshots (namespace);
CREATE INDEX snapshots_state ON snapshots (state);
CREATE INDEX snapshots_template ON snapshots (template);

CREATE TABLE operations (
    pk TEXT PRIMARY KEY,  -- id
    kind TEXT NOT NULL,
    namespace TEXT NOT NULL,
    state TEXT NOT NULL,
    uid TEXT NOT NULL,
    request TEXT NOT NULL,  -- namespace/request id, or "" without one
    data TEXT NOT NULL
) STRICT, WITHOUT ROWID;
CREATE INDEX operations_kind ON operations (kind);
CREATE INDEX operations_namespace ON operations (namespace);
CREATE INDEX operations_state ON operations (state);
CREATE INDEX operations_uid ON operations (uid);
CREATE INDEX operations_request ON operations (request) WHERE request <> '';

CREATE TABLE leases (
    pk TEXT PRIMARY KEY,  -- the actor's uid
    owner TEXT NOT NULL,
    data TEXT NOT NULL
) STRICT, WITHOUT ROWID;
CREATE INDEX leases_owner ON leases (owner);

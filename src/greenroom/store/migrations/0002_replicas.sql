-- The processes of the control plane that share the store.

CREATE TABLE replicas (
    pk TEXT PRIMARY KEY,  -- name
    data TEXT NOT NULL
) STRICT, WITHOUT ROWID;

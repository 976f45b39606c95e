-- The workers that a pool may have, where an operator keeps them.

CREATE TABLE rosters (
    pk TEXT PRIMARY KEY,  -- name of the pool
    data TEXT NOT NULL
) STRICT, WITHOUT ROWID;

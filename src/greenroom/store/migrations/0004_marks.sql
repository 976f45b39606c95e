-- What the places that an installation uses (its snapshot store) are known by.

CREATE TABLE marks (
    pk TEXT PRIMARY KEY,  -- name of the place
    data TEXT NOT NULL
) STRICT, WITHOUT ROWID;

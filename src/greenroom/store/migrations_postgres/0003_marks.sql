-- compatible_from: 3
-- What the places that an installation uses (its snapshot store) are known by. A program that knows nothing of
-- marks can't read the change feed of one that does.

CREATE TABLE marks (
    pk text COLLATE "C" PRIMARY KEY,  -- name of the place
    version bigint NOT NULL,
    data text COLLATE "C" NOT NULL
);

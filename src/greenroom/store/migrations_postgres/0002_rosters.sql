-- compatible_from: 2
-- The workers that a pool may have, where an operator keeps them. A program that knows nothing of rosters would let
-- workers register that are not on them.

CREATE TABLE rosters (
    pk text COLLATE "C" PRIMARY KEY,  -- name of the pool
    version bigint NOT NULL,
    data text COLLATE "C" NOT NULL
);

-- compatible_from: 1

-- One table a kind of record. `data` is the record as JSON, as the API shows it (fields with their default left out); text,
-- because nothing is looked up inside it and text costs the server nothing to take and to give. The columns before it
-- repeat what rows are found by. Collation "C": keys are ordered by code point, as everywhere else in Greenroom.
--
-- What belongs to an actor is partitioned by `cell`, crc32 of the actor's "namespace/name" modulo 64, which the client
-- computes; so an actor, its operations, its lease and its snapshots are in one partition.
--
-- Columns with few different values are indexed by themselves (equal keys are stored once, a few bytes a row), or where
-- they differ from what nearly every row has: a sleeping actor is in few indexes.

CREATE TABLE actors (
    cell smallint NOT NULL,
    pk text COLLATE "C" NOT NULL,  -- namespace/name
    version bigint NOT NULL,
    state text COLLATE "C" NOT NULL,
    worker text COLLATE "C" NOT NULL,
    template text COLLATE "C" NOT NULL,
    uid text COLLATE "C" NOT NULL,
    slot integer,  -- of the worker; the only thing here that the record does not say
    data text COLLATE "C" NOT NULL,
    PRIMARY KEY (pk, cell)
) PARTITION BY HASH (cell);
CREATE INDEX actors_state ON actors (state, pk) WHERE state <> 'Suspended';
CREATE INDEX actors_worker ON actors (worker, pk) WHERE worker <> '';
CREATE INDEX actors_template ON actors (template);
CREATE INDEX actors_uid ON actors (uid);

CREATE TABLE snapshots (
    cell smallint NOT NULL,
    pk text COLLATE "C" NOT NULL,  -- id
    version bigint NOT NULL,
    actor_uid text COLLATE "C" NOT NULL,
    namespace text COLLATE "C" NOT NULL,
    state text COLLATE "C" NOT NULL,
    template text COLLATE "C" NOT NULL,
    data text COLLATE "C" NOT NULL,
    PRIMARY KEY (pk, cell)
) PARTITION BY HASH (cell);
CREATE INDEX snapshots_actor_uid ON snapshots (actor_uid);
CREATE INDEX snapshots_namespace ON snapshots (namespace);
CREATE INDEX snapshots_state ON snapshots (state, pk) WHERE state <> 'Present';
CREATE INDEX snapshots_template ON snapshots (template);

CREATE TABLE operations (
    cell smallint NOT NULL,
    pk text COLLATE "C" NOT NULL,  -- id
    version bigint NOT NULL,
    kind text COLLATE "C" NOT NULL,
    namespace text COLLATE "C" NOT NULL,
    state text COLLATE "C" NOT NULL,
    uid text COLLATE "C" NOT NULL,
    request text COLLATE "C" NOT NULL,  -- namespace/request id, or '' without one
    data text COLLATE "C" NOT NULL,
    PRIMARY KEY (pk, cell)
) PARTITION BY HASH (cell);
CREATE INDEX operations_kind ON operations (kind);
CREATE INDEX operations_namespace ON operations (namespace);
CREATE INDEX operations_state ON operations (state, pk) WHERE state = 'Running';
CREATE INDEX operations_uid ON operations (uid);
CREATE INDEX operations_request ON operations (request) WHERE request <> '';

CREATE TABLE leases (
    cell smallint NOT NULL,
    pk text COLLATE "C" NOT NULL,  -- the actor's uid
    owner text COLLATE "C" NOT NULL,
    operation text COLLATE "C" NOT NULL,
    data text COLLATE "C" NOT NULL,
    PRIMARY KEY (pk, cell)
) PARTITION BY HASH (cell);
CREATE INDEX leases_owner ON leases (owner);

DO $$
DECLARE name text;
BEGIN
    FOREACH name IN ARRAY ARRAY['actors', 'snapshots', 'operations', 'leases'] LOOP
        FOR part IN 0..7 LOOP
            EXECUTE format('CREATE TABLE %I PARTITION OF %I FOR VALUES WITH (MODULUS 8, REMAINDER %s)',
                           name || '_' || part, name, part);
        END LOOP;
    END LOOP;
END $$;

CREATE TABLE templates (
    pk text COLLATE "C" PRIMARY KEY,  -- namespace/name
    version bigint NOT NULL,
    state text COLLATE "C" NOT NULL,
    pool text COLLATE "C" NOT NULL,
    golden text COLLATE "C" NOT NULL,  -- its golden snapshot
    data text COLLATE "C" NOT NULL
);
CREATE INDEX templates_state ON templates (state);

CREATE TABLE pools (
    pk text COLLATE "C" PRIMARY KEY,  -- name
    version bigint NOT NULL,
    data text COLLATE "C" NOT NULL
);

CREATE TABLE replicas (
    pk text COLLATE "C" PRIMARY KEY,  -- name
    version bigint NOT NULL,
    data text COLLATE "C" NOT NULL
);

CREATE TABLE workers (
    pk text COLLATE "C" PRIMARY KEY,  -- name
    version bigint NOT NULL,
    pool text COLLATE "C" NOT NULL,
    state text COLLATE "C" NOT NULL,
    capacity integer NOT NULL,
    data text COLLATE "C" NOT NULL  -- without `used`, which is counted in `slots`
);
CREATE INDEX workers_pool ON workers (pool);
CREATE INDEX workers_state ON workers (state);

-- One row a slot of a worker. A free one is taken by locking it and skipping those that are locked, so that no row is
-- waited for. As many rows as the worker's capacity, or as many as are taken if those are more: then the worker is
-- `crowded`, none is free, and one that is given back is deleted.
--
-- What changes is in no index, so that a row is written anew within its page and the page cleans itself. A free slot is
-- looked for from a random number on, which takes as many rows as there are slots to a free one.
CREATE TABLE slots (
    worker text COLLATE "C" NOT NULL,
    number integer NOT NULL,
    actor_uid text COLLATE "C" NOT NULL,  -- '' when it is free
    crowded boolean NOT NULL DEFAULT false,
    PRIMARY KEY (worker, number)
) WITH (fillfactor = 50);

-- What was written, for the other processes: each reads what has become visible since its last look. Rows are written
-- after the row that they tell of has been locked, so the order of `id` is the order in which one record changed.
CREATE TABLE outbox (
    xact xid8 NOT NULL DEFAULT pg_current_xact_id(),
    id bigint GENERATED ALWAYS AS IDENTITY,
    at timestamptz NOT NULL DEFAULT clock_timestamp(),
    writer text COLLATE "C" NOT NULL,  -- the process
    type text COLLATE "C" NOT NULL,
    kind text COLLATE "C" NOT NULL,
    pk text COLLATE "C" NOT NULL,
    data text COLLATE "C" NOT NULL,
    PRIMARY KEY (xact, id)
) WITH (autovacuum_vacuum_scale_factor = 0.2, autovacuum_vacuum_cost_delay = 0);

-- Writes what was decided for one actor, if every row that the decision was made from is still as it was read. A row's
-- `xmin` is the transaction that wrote it, so (key, xmin) is one state of one record, also when a record was removed and
-- made anew with the same version.
--
-- a_: the actor; a_xmin null: there was none, a_data null: it stays as it is. o_: its operation; o_xmin null: it is new.
-- l_: the lease; l_xmin null: whatever there is is replaced. t_: the template, k_: the worker, r_: snapshots that were read.
-- s_: snapshots to write; an xmin of null: it is new. w_take, w_free: workers of whom a slot changes hands.
-- check_new: nobody has looked yet whether the operation's id is known already.
--
-- event: the last row in the outbox, if there is one. code: '' when it is written, 'stale' when something has changed, 'full' when the worker has no free slot. Otherwise
-- raises GR001, which is 'stale' noticed after the first write.
--
-- One function a partition: a statement on a whole partitioned table would open all of its partitions each time, which
-- takes longer than the write. Its caller knows in which one the actor is.
DO $do$ BEGIN FOR part IN 0..7 LOOP EXECUTE replace($function$
    CREATE FUNCTION write_change_v1_{part}(
        p_writer text, p_cell smallint, check_new boolean,
        a_pk text, a_xmin xid, a_deletes boolean, a_version bigint,
        a_state text, a_worker text, a_template text, a_uid text, a_data text,
        o_pk text, o_xmin xid, o_version bigint, o_kind text, o_namespace text, o_state text, o_request text, o_data text,
        l_xmin xid, l_owner text, l_operation text, l_data text, l_drops boolean,
        t_pk text, t_xmin xid, k_pk text, k_xmin xid,
        r_cells smallint[], r_pks text[], r_xmins xid[],
        w_take text, w_take_xmin xid, w_take_from integer, w_free text,
        s_cells smallint[], s_pks text[], s_xmins xid[], s_versions bigint[],
        s_actor_uids text[], s_namespaces text[], s_states text[], s_templates text[], s_datas text[],
        OUT code text, OUT xact xid, OUT event bigint
    ) LANGUAGE plpgsql AS $body$
    DECLARE
        room integer;
        old_slot integer;
        new_slot integer;
        a_type text;
        taken integer;
        i integer;
    BEGIN
        code := 'stale';
        -- Conditions one by one: a query in one is set up even where what stands before it is enough.
        IF check_new THEN
            IF EXISTS (SELECT FROM operations WHERE pk = o_pk) THEN RETURN; END IF;
        END IF;
        IF o_xmin IS NULL AND o_request <> '' THEN
            -- A request may be repeated for another actor at the same time, whose row says nothing about it.
            PERFORM pg_advisory_xact_lock(hashtextextended(o_request, 0));
            IF EXISTS (SELECT FROM operations WHERE request = o_request AND request <> '') THEN RETURN; END IF;
        END IF;
        IF t_pk IS NOT NULL THEN
            IF NOT EXISTS (SELECT FROM templates WHERE pk = t_pk AND xmin = t_xmin) THEN RETURN; END IF;
        END IF;
        IF k_pk IS NOT NULL THEN  -- locked: whoever writes that the worker is heard again comes after this
            PERFORM FROM workers WHERE pk = k_pk AND xmin = k_xmin FOR SHARE;
            IF NOT FOUND THEN RETURN; END IF;
        END IF;
        FOR i IN 1 .. coalesce(array_length(r_pks, 1), 0) LOOP
            IF NOT EXISTS (SELECT FROM snapshots WHERE cell = r_cells[i] AND pk = r_pks[i] AND xmin = r_xmins[i]) THEN
                RETURN;
            END IF;
        END LOOP;

        IF w_take IS NOT NULL THEN
            UPDATE slots SET actor_uid = a_uid WHERE worker = w_take AND number = (
                SELECT number FROM slots WHERE worker = w_take AND number >= w_take_from AND actor_uid = ''
                ORDER BY number LIMIT 1 FOR UPDATE SKIP LOCKED)
            RETURNING number INTO new_slot;
            IF NOT FOUND THEN
                UPDATE slots SET actor_uid = a_uid WHERE worker = w_take AND number = (
                    SELECT number FROM slots WHERE worker = w_take AND number < w_take_from AND actor_uid = ''
                    ORDER BY number LIMIT 1 FOR UPDATE SKIP LOCKED)
                RETURNING number INTO new_slot;
                IF NOT FOUND THEN code := 'full'; RETURN; END IF;
            END IF;
            -- After the slot, which who changes the worker's state locks.
            IF NOT EXISTS (SELECT FROM workers WHERE pk = w_take AND xmin = w_take_xmin AND state = 'Active') THEN
                RAISE EXCEPTION 'worker % has changed', w_take USING ERRCODE = 'GR001';
            END IF;
        END IF;

        IF w_free IS NOT NULL THEN
            SELECT slot INTO old_slot FROM actors_{part} WHERE cell = p_cell AND pk = a_pk AND xmin = a_xmin;
        END IF;

        IF a_data IS NULL THEN
            IF a_xmin IS NOT NULL THEN
                PERFORM FROM actors_{part} WHERE cell = p_cell AND pk = a_pk AND xmin = a_xmin FOR NO KEY UPDATE;
                IF NOT FOUND THEN RAISE EXCEPTION 'actor % has changed', a_pk USING ERRCODE = 'GR001'; END IF;
            END IF;
        ELSIF a_xmin IS NULL THEN
            INSERT INTO actors_{part} (cell, pk, version, state, worker, template, uid, data)
            VALUES (p_cell, a_pk, a_version, a_state, a_worker, a_template, a_uid, a_data);
        ELSIF a_deletes THEN
            DELETE FROM actors_{part} WHERE cell = p_cell AND pk = a_pk AND xmin = a_xmin;
        ELSE
            UPDATE actors_{part} SET version = a_version, state = a_state, worker = a_worker, data = a_data,
                slot = CASE WHEN a_worker <> '' THEN coalesce(new_slot, slot) END
            WHERE cell = p_cell AND pk = a_pk AND xmin = a_xmin;
        END IF;
        IF a_data IS NOT NULL AND NOT FOUND THEN
            RAISE EXCEPTION 'actor % has changed', a_pk USING ERRCODE = 'GR001';
        END IF;

        -- After the actor, which who makes a worker that is in use locks.
        IF w_free IS NOT NULL THEN
            UPDATE slots SET actor_uid = ''
            WHERE worker = w_free AND number = old_slot AND actor_uid = a_uid AND NOT crowded;
            IF NOT FOUND THEN
                SELECT capacity INTO room FROM workers WHERE pk = w_free FOR UPDATE;
                IF FOUND THEN
                    DELETE FROM slots
                    WHERE worker = w_free AND number = old_slot AND actor_uid = a_uid AND crowded;
                    IF FOUND THEN
                        SELECT count(*) INTO taken FROM slots WHERE worker = w_free;
                        IF taken <= room THEN UPDATE slots SET crowded = false WHERE worker = w_free; END IF;
                    ELSE  -- it has become less crowded, or was made anew, since the first look
                        UPDATE slots SET actor_uid = ''
                        WHERE worker = w_free AND number = old_slot AND actor_uid = a_uid;
                        IF NOT FOUND THEN RAISE EXCEPTION 'actor % has no slot of worker %', a_pk, w_free; END IF;
                    END IF;
                END IF;  -- else the worker was removed, and its slots with it
            END IF;
        END IF;

        IF l_data IS NOT NULL AND l_xmin IS NOT NULL THEN
            UPDATE leases_{part} SET owner = l_owner, operation = l_operation, data = l_data
            WHERE cell = p_cell AND pk = a_uid AND xmin = l_xmin;
            IF NOT FOUND THEN RAISE EXCEPTION 'the lease of % has changed', a_pk USING ERRCODE = 'GR001'; END IF;
        ELSIF l_data IS NOT NULL THEN
            INSERT INTO leases_{part} (cell, pk, owner, operation, data) VALUES (p_cell, a_uid, l_owner, l_operation, l_data)
            ON CONFLICT (pk, cell) DO UPDATE
            SET owner = excluded.owner, operation = excluded.operation, data = excluded.data;
        ELSIF l_drops THEN
            DELETE FROM leases_{part} WHERE cell = p_cell AND pk = a_uid;
        END IF;

        FOR i IN 1 .. coalesce(array_length(s_pks, 1), 0) LOOP
            IF s_xmins[i] IS NULL THEN
                INSERT INTO snapshots_{part} (cell, pk, version, actor_uid, namespace, state, template, data)
                VALUES (s_cells[i], s_pks[i], s_versions[i], s_actor_uids[i], s_namespaces[i], s_states[i], s_templates[i],
                        s_datas[i]);
            ELSE
                UPDATE snapshots_{part} SET version = s_versions[i], state = s_states[i], data = s_datas[i]
                WHERE cell = s_cells[i] AND pk = s_pks[i] AND xmin = s_xmins[i];
                IF NOT FOUND THEN  -- perhaps it is another actor's, as a golden one is
                    UPDATE snapshots SET version = s_versions[i], state = s_states[i], data = s_datas[i]
                    WHERE cell = s_cells[i] AND pk = s_pks[i] AND xmin = s_xmins[i];
                    IF NOT FOUND THEN
                        RAISE EXCEPTION 'snapshot % has changed', s_pks[i] USING ERRCODE = 'GR001';
                    END IF;
                END IF;
            END IF;
            INSERT INTO outbox (writer, type, kind, pk, data) VALUES (p_writer, 'Put', 'Snapshot', s_pks[i], s_datas[i]);
            event := lastval();
        END LOOP;
        IF o_data IS NOT NULL THEN
            IF o_xmin IS NULL THEN
                INSERT INTO operations_{part} (cell, pk, version, kind, namespace, state, uid, request, data)
                VALUES (p_cell, o_pk, o_version, o_kind, o_namespace, o_state, a_uid, o_request, o_data);
            ELSE
                UPDATE operations_{part} SET version = o_version, state = o_state, data = o_data
                WHERE cell = p_cell AND pk = o_pk AND xmin = o_xmin;
                IF NOT FOUND THEN RAISE EXCEPTION 'operation % has changed', o_pk USING ERRCODE = 'GR001'; END IF;
            END IF;
        END IF;

        -- Events in the order of what happened; the operation's comes last: who waits for its end then finds the rest.
        a_type := CASE WHEN a_deletes THEN 'Deleted' ELSE 'Put' END;
        IF a_data IS NOT NULL AND o_data IS NOT NULL THEN
            INSERT INTO outbox (writer, type, kind, pk, data)
            VALUES (p_writer, a_type, 'Actor', a_pk, a_data), (p_writer, 'Put', 'Operation', o_pk, o_data);
            event := lastval();
        ELSIF a_data IS NOT NULL THEN
            INSERT INTO outbox (writer, type, kind, pk, data) VALUES (p_writer, a_type, 'Actor', a_pk, a_data);
            event := lastval();
        ELSIF o_data IS NOT NULL THEN
            INSERT INTO outbox (writer, type, kind, pk, data) VALUES (p_writer, 'Put', 'Operation', o_pk, o_data);
            event := lastval();
        END IF;
        code := '';
        xact := pg_current_xact_id()::xid;
    END $body$
$function$, '{part}', part::text); END LOOP; END $do$;

-- Inserts a worker (p_old 0) or replaces the one of version p_old, and makes its slots as many as it has room for.
-- used: how many are taken; null when the version was another.
CREATE FUNCTION put_worker_v1(
    p_writer text, p_pk text, p_version bigint, p_data text, p_old bigint, p_pool text, p_state text, p_capacity integer,
    OUT used integer, OUT event bigint
) LANGUAGE plpgsql AS $$
DECLARE
    total integer;
    want integer;
BEGIN
    IF p_old = 0 THEN
        INSERT INTO workers (pk, version, pool, state, capacity, data)
        VALUES (p_pk, p_version, p_pool, p_state, p_capacity, p_data) ON CONFLICT DO NOTHING;
        IF NOT FOUND THEN RETURN; END IF;
        -- Those who unbind an actor of a worker of this name do it before, and are not seen, or find the slot after.
        PERFORM FROM actors WHERE worker = p_pk AND worker <> '' FOR UPDATE;
        INSERT INTO slots (worker, number, actor_uid)
        SELECT p_pk, row_number() OVER (ORDER BY pk) - 1, uid FROM actors WHERE worker = p_pk AND worker <> '';
        UPDATE actors a SET slot = s.number FROM slots s
        WHERE a.worker = p_pk AND a.worker <> '' AND s.worker = p_pk AND s.actor_uid = a.uid;
    ELSE
        UPDATE workers SET version = p_version, pool = p_pool, state = p_state, capacity = p_capacity, data = p_data
        WHERE pk = p_pk AND version = p_old;
        IF NOT FOUND THEN RETURN; END IF;
    END IF;
    -- Who is about to take a slot is waited for, or passes over it: afterwards nobody takes one for what the worker was.
    PERFORM FROM slots WHERE worker = p_pk FOR UPDATE;
    SELECT count(*), count(*) FILTER (WHERE actor_uid <> '') INTO total, used FROM slots WHERE worker = p_pk;
    want := greatest(p_capacity, used);
    IF total > want THEN
        DELETE FROM slots WHERE worker = p_pk AND number IN (
            SELECT number FROM slots WHERE worker = p_pk AND actor_uid = '' ORDER BY number DESC LIMIT total - want);
    ELSIF total < want THEN
        INSERT INTO slots (worker, number, actor_uid)
        SELECT p_pk, base.number + i, ''
        FROM (SELECT coalesce(max(number), -1) AS number FROM slots WHERE worker = p_pk) base,
             generate_series(1, want - total) i;
    END IF;
    UPDATE slots SET crowded = used > p_capacity WHERE worker = p_pk AND crowded <> (used > p_capacity);
    INSERT INTO outbox (writer, type, kind, pk, data) 
    VALUES (p_writer, 'Put', 'Worker', p_pk,
            CASE WHEN used > 0 THEN left(p_data, -1) || ',"used":' || used || '}' ELSE p_data END)
    RETURNING id INTO event;
END $$;

-- data: the worker as it was, used: how many of its slots were taken; null when the version was another.
CREATE FUNCTION remove_worker_v1(p_writer text, p_pk text, p_old bigint, OUT event bigint, OUT data text, OUT used integer)
LANGUAGE plpgsql AS $$
BEGIN
    DELETE FROM workers w WHERE w.pk = p_pk AND w.version = p_old RETURNING w.data INTO data;
    IF NOT FOUND THEN RETURN; END IF;
    PERFORM FROM slots WHERE worker = p_pk FOR UPDATE;
    SELECT count(*) INTO used FROM slots WHERE worker = p_pk AND actor_uid <> '';
    DELETE FROM slots WHERE worker = p_pk;
    INSERT INTO outbox AS o (writer, type, kind, pk, data) VALUES (p_writer, 'Deleted', 'Worker', p_pk, data)
    RETURNING id INTO event;
END $$;

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
-- Finished ones are kept by the ten thousand, which are soon looked through, and written by the thousand a second.
CREATE INDEX operations_state ON operations (state, pk) WHERE state = 'Running';
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

-- What was decided for one actor; it is written if every row that it was decided from is still as it was read. A row's
-- `xmin` is the transaction that wrote it, so (key, xmin) is one state of one record, also when a record was removed and
-- made anew with the same version.
CREATE TYPE change_v1 AS (
    part integer, cell smallint,  -- where the actor is
    check_new boolean,  -- nobody has looked yet whether the operation's id is known already
    -- The actor; a_xmin null: there was none, a_data null: it stays as it is.
    a_pk text, a_xmin xid, a_deletes boolean, a_version bigint,
    a_state text, a_worker text, a_template text, a_uid text, a_data text,
    -- Its operation; o_xmin null: it is new.
    o_pk text, o_xmin xid, o_version bigint, o_kind text, o_namespace text, o_state text, o_request text, o_data text,
    -- Its lease; l_xmin null: whatever there is is replaced.
    l_xmin xid, l_owner text, l_operation text, l_data text, l_drops boolean,
    -- What was read: the template, the worker, snapshots.
    t_pk text, t_xmin xid, k_pk text, k_xmin xid,
    r_cells smallint[], r_pks text[], r_xmins xid[],
    -- Workers of whom a slot changes hands.
    w_take text, w_take_xmin xid, w_take_from integer, w_free text,
    -- Snapshots to write; an xmin of null: it is new.
    s_cells smallint[], s_pks text[], s_xmins xid[], s_versions bigint[],
    s_actor_uids text[], s_namespaces text[], s_states text[], s_templates text[], s_datas text[]
);

-- Gives '' when it is written, 'stale' when something has changed, 'full' when the worker has no free slot. Otherwise
-- raises GR001, which is 'stale' noticed after the first write.
--
-- One function a partition: a statement on a whole partitioned table would open all of its partitions each time, which
-- takes longer than the write.
DO $do$ BEGIN FOR part IN 0..7 LOOP EXECUTE replace($function$
    CREATE FUNCTION write_change_v1_{part}(c change_v1) RETURNS text LANGUAGE plpgsql AS $body$
    DECLARE
        room integer;
        old_slot integer;
        new_slot integer;
        taken integer;
        i integer;
    BEGIN
        -- Conditions one by one: a query in one is set up even where what stands before it is enough.
        IF c.check_new THEN
            IF EXISTS (SELECT FROM operations WHERE pk = c.o_pk) THEN RETURN 'stale'; END IF;
        END IF;
        IF c.o_xmin IS NULL AND c.o_request <> '' THEN
            -- A request may be repeated for another actor at the same time, whose row says nothing about it.
            PERFORM pg_advisory_xact_lock(hashtextextended(c.o_request, 0));
            IF EXISTS (SELECT FROM operations WHERE request = c.o_request AND request <> '') THEN RETURN 'stale'; END IF;
        END IF;
        IF c.t_pk IS NOT NULL THEN
            IF NOT EXISTS (SELECT FROM templates WHERE pk = c.t_pk AND xmin = c.t_xmin) THEN RETURN 'stale'; END IF;
        END IF;
        IF c.k_pk IS NOT NULL THEN  -- locked: whoever writes that the worker is heard again comes after this
            PERFORM FROM workers WHERE pk = c.k_pk AND xmin = c.k_xmin FOR SHARE;
            IF NOT FOUND THEN RETURN 'stale'; END IF;
        END IF;
        FOR i IN 1 .. coalesce(array_length(c.r_pks, 1), 0) LOOP
            IF NOT EXISTS (SELECT FROM snapshots WHERE cell = c.r_cells[i] AND pk = c.r_pks[i] AND xmin = c.r_xmins[i]) THEN
                RETURN 'stale';
            END IF;
        END LOOP;

        IF c.w_take IS NOT NULL THEN
            UPDATE slots SET actor_uid = c.a_uid WHERE worker = c.w_take AND number = (
                SELECT number FROM slots WHERE worker = c.w_take AND number >= c.w_take_from AND actor_uid = ''
                ORDER BY number LIMIT 1 FOR UPDATE SKIP LOCKED)
            RETURNING number INTO new_slot;
            IF NOT FOUND THEN
                UPDATE slots SET actor_uid = c.a_uid WHERE worker = c.w_take AND number = (
                    SELECT number FROM slots WHERE worker = c.w_take AND number < c.w_take_from AND actor_uid = ''
                    ORDER BY number LIMIT 1 FOR UPDATE SKIP LOCKED)
                RETURNING number INTO new_slot;
                IF NOT FOUND THEN RETURN 'full'; END IF;
            END IF;
            -- After the slot, which who changes the worker's state locks.
            IF NOT EXISTS (SELECT FROM workers WHERE pk = c.w_take AND xmin = c.w_take_xmin AND state = 'Active') THEN
                RAISE EXCEPTION 'worker % has changed', c.w_take USING ERRCODE = 'GR001';
            END IF;
        END IF;

        IF c.w_free IS NOT NULL THEN
            SELECT slot INTO old_slot FROM actors_{part} WHERE cell = c.cell AND pk = c.a_pk AND xmin = c.a_xmin;
        END IF;

        IF c.a_data IS NULL THEN
            IF c.a_xmin IS NOT NULL THEN
                PERFORM FROM actors_{part} WHERE cell = c.cell AND pk = c.a_pk AND xmin = c.a_xmin FOR NO KEY UPDATE;
                IF NOT FOUND THEN RAISE EXCEPTION 'actor % has changed', c.a_pk USING ERRCODE = 'GR001'; END IF;
            END IF;
        ELSIF c.a_xmin IS NULL THEN
            INSERT INTO actors_{part} (cell, pk, version, state, worker, template, uid, data)
            VALUES (c.cell, c.a_pk, c.a_version, c.a_state, c.a_worker, c.a_template, c.a_uid, c.a_data);
        ELSIF c.a_deletes THEN
            DELETE FROM actors_{part} WHERE cell = c.cell AND pk = c.a_pk AND xmin = c.a_xmin;
        ELSE
            UPDATE actors_{part} SET version = c.a_version, state = c.a_state, worker = c.a_worker, data = c.a_data,
                slot = CASE WHEN c.a_worker <> '' THEN coalesce(new_slot, slot) END
            WHERE cell = c.cell AND pk = c.a_pk AND xmin = c.a_xmin;
        END IF;
        IF c.a_data IS NOT NULL AND NOT FOUND THEN
            RAISE EXCEPTION 'actor % has changed', c.a_pk USING ERRCODE = 'GR001';
        END IF;

        -- After the actor, which who makes a worker that is in use locks.
        IF c.w_free IS NOT NULL THEN
            UPDATE slots SET actor_uid = ''
            WHERE worker = c.w_free AND number = old_slot AND actor_uid = c.a_uid AND NOT crowded;
            IF NOT FOUND THEN
                SELECT capacity INTO room FROM workers WHERE pk = c.w_free FOR UPDATE;
                IF FOUND THEN
                    DELETE FROM slots
                    WHERE worker = c.w_free AND number = old_slot AND actor_uid = c.a_uid AND crowded;
                    IF FOUND THEN
                        SELECT count(*) INTO taken FROM slots WHERE worker = c.w_free;
                        IF taken <= room THEN UPDATE slots SET crowded = false WHERE worker = c.w_free; END IF;
                    ELSE  -- it has become less crowded, or was made anew, since the first look
                        UPDATE slots SET actor_uid = ''
                        WHERE worker = c.w_free AND number = old_slot AND actor_uid = c.a_uid;
                        IF NOT FOUND THEN RAISE EXCEPTION 'actor % has no slot of worker %', c.a_pk, c.w_free; END IF;
                    END IF;
                END IF;  -- else the worker was removed, and its slots with it
            END IF;
        END IF;

        IF c.l_data IS NOT NULL AND c.l_xmin IS NOT NULL THEN
            UPDATE leases_{part} SET owner = c.l_owner, operation = c.l_operation, data = c.l_data
            WHERE cell = c.cell AND pk = c.a_uid AND xmin = c.l_xmin;
            IF NOT FOUND THEN RAISE EXCEPTION 'the lease of % has changed', c.a_pk USING ERRCODE = 'GR001'; END IF;
        ELSIF c.l_data IS NOT NULL THEN
            INSERT INTO leases_{part} (cell, pk, owner, operation, data) VALUES (c.cell, c.a_uid, c.l_owner, c.l_operation, c.l_data)
            ON CONFLICT (pk, cell) DO UPDATE
            SET owner = excluded.owner, operation = excluded.operation, data = excluded.data;
        ELSIF c.l_drops THEN
            DELETE FROM leases_{part} WHERE cell = c.cell AND pk = c.a_uid;
        END IF;

        FOR i IN 1 .. coalesce(array_length(c.s_pks, 1), 0) LOOP
            IF c.s_xmins[i] IS NULL THEN
                INSERT INTO snapshots_{part} (cell, pk, version, actor_uid, namespace, state, template, data)
                VALUES (c.s_cells[i], c.s_pks[i], c.s_versions[i], c.s_actor_uids[i], c.s_namespaces[i], c.s_states[i], c.s_templates[i],
                        c.s_datas[i]);
            ELSE
                UPDATE snapshots_{part} SET version = c.s_versions[i], state = c.s_states[i], data = c.s_datas[i]
                WHERE cell = c.s_cells[i] AND pk = c.s_pks[i] AND xmin = c.s_xmins[i];
                IF NOT FOUND THEN  -- perhaps it is another actor's, as a golden one is
                    UPDATE snapshots SET version = c.s_versions[i], state = c.s_states[i], data = c.s_datas[i]
                    WHERE cell = c.s_cells[i] AND pk = c.s_pks[i] AND xmin = c.s_xmins[i];
                    IF NOT FOUND THEN
                        RAISE EXCEPTION 'snapshot % has changed', c.s_pks[i] USING ERRCODE = 'GR001';
                    END IF;
                END IF;
            END IF;
        END LOOP;
        IF c.o_data IS NOT NULL THEN
            IF c.o_xmin IS NULL THEN
                INSERT INTO operations_{part} (cell, pk, version, kind, namespace, state, uid, request, data)
                VALUES (c.cell, c.o_pk, c.o_version, c.o_kind, c.o_namespace, c.o_state, c.a_uid, c.o_request, c.o_data);
            ELSE
                UPDATE operations_{part} SET version = c.o_version, state = c.o_state, data = c.o_data
                WHERE cell = c.cell AND pk = c.o_pk AND xmin = c.o_xmin;
                IF NOT FOUND THEN RAISE EXCEPTION 'operation % has changed', c.o_pk USING ERRCODE = 'GR001'; END IF;
            END IF;
        END IF;

        RETURN '';
    END $body$
$function$, '{part}', part::text); END LOOP; END $do$;

-- Writes several changes (a JSON array of `change_v1`) in one transaction: what a commit costs, all share. Tells of each
-- what `write_change_v1` gives, with commas between; one that raises undoes all. With p_wait_ms, no row that another
-- transaction has locked is waited for longer: those who come together should not wait for one of them for long.
--
-- event: the number of the last row in the outbox. Rows come in the order of what happened, an actor's operation last: who
-- waits for its end then finds the rest.
CREATE FUNCTION write_changes_v1(p_writer text, p_changes json, p_wait_ms integer, OUT codes text, OUT xact xid, OUT event bigint)
LANGUAGE plpgsql AS $$
DECLARE
    c change_v1;
    code text;
    types text[];
    kinds text[];
    pks text[];
    datas text[];
    i integer;
BEGIN
    IF p_wait_ms IS NOT NULL THEN
        PERFORM set_config('lock_timeout', p_wait_ms::text, true);
    END IF;
    FOR c IN SELECT * FROM json_populate_recordset(NULL::change_v1, p_changes) LOOP
        CASE c.part
            WHEN 0 THEN code := write_change_v1_0(c);
            WHEN 1 THEN code := write_change_v1_1(c);
            WHEN 2 THEN code := write_change_v1_2(c);
            WHEN 3 THEN code := write_change_v1_3(c);
            WHEN 4 THEN code := write_change_v1_4(c);
            WHEN 5 THEN code := write_change_v1_5(c);
            WHEN 6 THEN code := write_change_v1_6(c);
            WHEN 7 THEN code := write_change_v1_7(c);
        END CASE;
        codes := CASE WHEN codes IS NULL THEN code ELSE codes || ',' || code END;
        IF code = '' THEN
            FOR i IN 1 .. coalesce(array_length(c.s_pks, 1), 0) LOOP
                types := types || 'Put'::text;
                kinds := kinds || 'Snapshot'::text;
                pks := pks || c.s_pks[i];
                datas := datas || c.s_datas[i];
            END LOOP;
            IF c.a_data IS NOT NULL THEN
                types := types || CASE WHEN c.a_deletes THEN 'Deleted' ELSE 'Put' END;
                kinds := kinds || 'Actor'::text;
                pks := pks || c.a_pk;
                datas := datas || c.a_data;
            END IF;
            IF c.o_data IS NOT NULL THEN
                types := types || 'Put'::text;
                kinds := kinds || 'Operation'::text;
                pks := pks || c.o_pk;
                datas := datas || c.o_data;
            END IF;
        END IF;
    END LOOP;
    IF pks IS NOT NULL THEN
        INSERT INTO outbox (writer, type, kind, pk, data)
        SELECT p_writer, e.type, e.kind, e.pk, e.data
        FROM unnest(types, kinds, pks, datas) WITH ORDINALITY e(type, kind, pk, data, n) ORDER BY e.n;
        event := lastval();
        xact := pg_current_xact_id()::xid;
    END IF;
END $$;

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

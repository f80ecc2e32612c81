-- Plans that wait for a person: what a limit stopped, and who let it go on.

ALTER TABLE plan ADD COLUMN state text NOT NULL DEFAULT 'PROPOSED' CHECK (state IN ('PROPOSED', 'APPROVED', 'REJECTED'));
ALTER TABLE plan ADD COLUMN reason text;
ALTER TABLE plan ADD COLUMN approvals smallint NOT NULL DEFAULT 1 CHECK (approvals >= 1);
ALTER TABLE plan ADD COLUMN valid_until moment NOT NULL DEFAULT now();
CREATE INDEX plan_waiting ON plan (created_at) WHERE state = 'PROPOSED';
COMMENT ON COLUMN plan.state IS 'PROPOSED, APPROVED or REJECTED.';
COMMENT ON COLUMN plan.reason IS 'Which limit stopped it, and what was found.';
COMMENT ON COLUMN plan.approvals IS 'How many people have to approve it.';
COMMENT ON COLUMN plan.valid_until IS 'Proposed: it can be approved until then; approved: what it names passes the limits until then.';

CREATE TABLE plan_entry (
  plan_id uuid NOT NULL REFERENCES plan,
  uid     uuid NOT NULL REFERENCES replica,
  oid     uuid NOT NULL REFERENCES data_item,
  size    bigint NOT NULL CHECK (size >= 0),
  basis   text NOT NULL CHECK (basis IN ('item_expired', 'replica_expired')),
  reason  text NOT NULL CHECK (reason <> ''),
  PRIMARY KEY (plan_id, uid)
);
CREATE INDEX plan_entry_uid ON plan_entry (uid);
CREATE INDEX plan_entry_oid ON plan_entry (oid);
COMMENT ON TABLE plan_entry IS 'What a plan would do: the replicas it would trash; append-only.';
COMMENT ON COLUMN plan_entry.plan_id IS 'The plan.';
COMMENT ON COLUMN plan_entry.uid IS 'The replica.';
COMMENT ON COLUMN plan_entry.oid IS 'Its item.';
COMMENT ON COLUMN plan_entry.size IS 'Bytes.';
COMMENT ON COLUMN plan_entry.basis IS 'item_expired or replica_expired.';
COMMENT ON COLUMN plan_entry.reason IS 'Why.';

CREATE TABLE plan_decision (
  plan_id    uuid NOT NULL REFERENCES plan,
  actor      text NOT NULL CHECK (actor <> ''),
  decision   text NOT NULL CHECK (decision IN ('approved', 'rejected')),
  reason     text,
  created_at moment NOT NULL DEFAULT now(),
  seq        bigint GENERATED ALWAYS AS IDENTITY,
  PRIMARY KEY (plan_id, seq)
);
COMMENT ON TABLE plan_decision IS 'Who approved or rejected a plan; append-only.';
COMMENT ON COLUMN plan_decision.plan_id IS 'The plan.';
COMMENT ON COLUMN plan_decision.actor IS 'Who.';
COMMENT ON COLUMN plan_decision.decision IS 'approved or rejected.';
COMMENT ON COLUMN plan_decision.reason IS 'Why.';
COMMENT ON COLUMN plan_decision.created_at IS 'When.';
COMMENT ON COLUMN plan_decision.seq IS 'Order of the decisions.';

-- The hash of what a plan's entries say now.
CREATE FUNCTION plan_hash(p_plan uuid) RETURNS text LANGUAGE sql STABLE AS $$
  SELECT encode(dlm_chain(ROW(uid, oid, size, basis, reason)::text ORDER BY uid), 'hex')
    FROM plan_entry WHERE plan_id = p_plan
$$;
-- People who approved a plan since it was last rejected.
CREATE FUNCTION plan_approvals(p_plan uuid) RETURNS bigint LANGUAGE sql STABLE AS $$
  SELECT count(DISTINCT actor) FROM plan_decision WHERE plan_id = p_plan AND decision = 'approved'
     AND seq > coalesce((SELECT max(seq) FROM plan_decision WHERE plan_id = p_plan AND decision = 'rejected'), 0)
$$;

CREATE FUNCTION plan_changed() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
  IF TG_OP = 'INSERT' THEN
    INSERT INTO event (noun, action, new_state, actor, detail) VALUES ('plan', 'proposed', NEW.state, dlm_actor(), to_jsonb(NEW));
    RETURN NULL;
  END IF;
  IF (NEW.plan_id, NEW.kind, NEW.content_hash, NEW.operations, NEW.bytes, NEW.actor, NEW.created_at, NEW.reason, NEW.approvals)
     IS DISTINCT FROM (OLD.plan_id, OLD.kind, OLD.content_hash, OLD.operations, OLD.bytes, OLD.actor, OLD.created_at, OLD.reason, OLD.approvals) THEN
    PERFORM dlm_refuse(format('plan %s: what it says never changes', OLD.plan_id));
  END IF;
  IF NEW.state = 'PROPOSED' AND OLD.state <> 'PROPOSED' THEN
    PERFORM dlm_refuse(format('plan %s is %s; it is not proposed again', OLD.plan_id, OLD.state));
  END IF;
  IF NEW.state = 'APPROVED' AND (OLD.state <> 'APPROVED' OR NEW.valid_until > OLD.valid_until)
     AND (plan_approvals(NEW.plan_id) < NEW.approvals OR plan_hash(NEW.plan_id) IS DISTINCT FROM NEW.content_hash) THEN
    PERFORM dlm_refuse(format('plan %s has not the approvals it needs, or its entries are not those that were proposed', OLD.plan_id));
  END IF;
  IF NEW.state <> OLD.state THEN
    INSERT INTO event (noun, action, old_state, new_state, actor, detail)
      VALUES ('plan', 'state', OLD.state, NEW.state, dlm_actor(), jsonb_build_object('plan_id', NEW.plan_id, 'valid_until', NEW.valid_until));
  END IF;
  RETURN NULL;
END $$;
CREATE TRIGGER plan_changed AFTER INSERT OR UPDATE ON plan FOR EACH ROW EXECUTE FUNCTION plan_changed();

CREATE FUNCTION plan_decided() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
  INSERT INTO event (noun, action, actor, detail) VALUES ('plan', NEW.decision, dlm_actor(), to_jsonb(NEW));
  RETURN NULL;
END $$;
CREATE TRIGGER plan_decided AFTER INSERT ON plan_decision FOR EACH ROW EXECUTE FUNCTION plan_decided();

CREATE FUNCTION plan_entry_inserted() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
  IF EXISTS (SELECT FROM (SELECT DISTINCT plan_id FROM new_rows) n JOIN plan p USING (plan_id) WHERE p.state <> 'PROPOSED') THEN
    PERFORM dlm_refuse('a plan that was decided on takes no more entries');
  END IF;
  RETURN NULL;
END $$;
CREATE TRIGGER plan_entry_inserted AFTER INSERT ON plan_entry
  REFERENCING NEW TABLE AS new_rows FOR EACH STATEMENT EXECUTE FUNCTION plan_entry_inserted();

CREATE TRIGGER plan_kept BEFORE DELETE OR TRUNCATE ON plan FOR EACH STATEMENT EXECUTE FUNCTION dlm_refuse_change();
CREATE TRIGGER plan_entry_kept BEFORE UPDATE OR DELETE OR TRUNCATE ON plan_entry FOR EACH STATEMENT EXECUTE FUNCTION dlm_refuse_change();
CREATE TRIGGER plan_decision_kept BEFORE UPDATE OR DELETE OR TRUNCATE ON plan_decision FOR EACH STATEMENT EXECUTE FUNCTION dlm_refuse_change();

-- Entries of plans that are not for expiry's ordinary way: waiting, rejected, or approved and then
-- done by that plan alone.
CREATE VIEW plan_reserved AS
  SELECT e.uid, e.oid, e.basis, p.plan_id, p.state FROM plan p JOIN plan_entry e USING (plan_id)
   WHERE p.state = 'REJECTED' OR p.valid_until > dlm_now();

-- What was trashed of late without a plan, for the limits of a day.
CREATE INDEX deletion_trashed ON deletion (proved_at) WHERE step = 'trash' AND plan_id IS NULL;

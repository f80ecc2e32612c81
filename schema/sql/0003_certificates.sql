-- The rules of certificates, once a statement instead of once a row: a batch pays once.

DROP TRIGGER deletion_of_unheld ON deletion;
CREATE OR REPLACE FUNCTION deletion_of_unheld() RETURNS trigger LANGUAGE plpgsql AS $$
DECLARE v_uid uuid;
BEGIN
  LOCK TABLE hold IN SHARE MODE;
  IF EXISTS (SELECT FROM hold) THEN
    SELECT n.uid INTO v_uid FROM new_rows n WHERE EXISTS (
      SELECT FROM data_item i, LATERAL holds_on(i.oid, i.uri, i.collection_id) WHERE i.oid = n.oid OFFSET 0) LIMIT 1;
    IF FOUND THEN
      PERFORM dlm_refuse(format('replica %s is under a hold', v_uid));
    END IF;
  END IF;
  RETURN NULL;
END $$;

-- A parent's statement triggers do not fire for a statement that names a partition.
CREATE FUNCTION dlm_rule_certificates(p_name text) RETURNS void LANGUAGE plpgsql AS $$
DECLARE v_rule text;
BEGIN
  FOREACH v_rule IN ARRAY ARRAY['deletion_of_unheld'] LOOP
    IF NOT EXISTS (SELECT FROM pg_trigger WHERE tgrelid = p_name::regclass AND tgname = v_rule) THEN
      EXECUTE format('CREATE TRIGGER %I AFTER INSERT ON %I REFERENCING NEW TABLE AS new_rows
                      FOR EACH STATEMENT EXECUTE FUNCTION %I()', v_rule, p_name, v_rule);
    END IF;
  END LOOP;
END $$;
CREATE OR REPLACE FUNCTION dlm_keep_partition(p_name text) RETURNS void LANGUAGE plpgsql AS $$
BEGIN
  IF NOT EXISTS (SELECT FROM pg_trigger WHERE tgrelid = p_name::regclass AND tgname = 'kept') THEN
    EXECUTE format('CREATE TRIGGER kept BEFORE UPDATE OR DELETE OR TRUNCATE ON %I
                    FOR EACH STATEMENT EXECUTE FUNCTION dlm_refuse_change()', p_name);
  END IF;
  IF starts_with(p_name, 'deletion_') THEN
    PERFORM dlm_rule_certificates(p_name);
  END IF;
END $$;
SELECT dlm_rule_certificates('deletion');
SELECT dlm_keep_partition(inhrelid::regclass::text) FROM pg_inherits WHERE inhparent = 'deletion'::regclass;

-- A list of work, written by triggers for every batch: what it names is never removed, and a row that
-- names nothing is dropped when it is due.
ALTER TABLE evaluation DROP CONSTRAINT evaluation_oid_fkey;

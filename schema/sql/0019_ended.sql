-- What ended within a day may have been queued long before: a purge waits for its grace, a copy for
-- its turn.
CREATE INDEX operation_ended ON operation (finished_at) WHERE state IN ('DONE', 'CANCELLED');

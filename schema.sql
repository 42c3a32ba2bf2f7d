-- The tables of the database, version by version: a new database runs them all, an old one
-- those that it has not seen.

-- version 1

CREATE TABLE tasks (
  seq INTEGER PRIMARY KEY AUTOINCREMENT,
  id TEXT NOT NULL UNIQUE,
  prompt TEXT NOT NULL,
  status TEXT NOT NULL CHECK (status IN ('pending', 'processing', 'completed', 'failed')),
  file_path TEXT,
  error TEXT,
  created_at TEXT NOT NULL,
  updated_at TEXT NOT NULL,
  error_code TEXT,
  model TEXT NOT NULL,
  params TEXT NOT NULL,
  priority INTEGER NOT NULL,
  attempts INTEGER NOT NULL DEFAULT 0,
  calls INTEGER NOT NULL DEFAULT 0,
  not_before REAL,
  last_error TEXT,
  started_at TEXT,
  finished_at TEXT,
  content_type TEXT,
  bytes INTEGER,
  width INTEGER,
  height INTEGER,
  sha256 TEXT,
  canceling INTEGER NOT NULL DEFAULT 0,
  retried_as TEXT
) STRICT;

CREATE INDEX tasks_ready ON tasks (model, priority DESC, seq)
  WHERE status = 'pending' AND not_before IS NULL;
CREATE INDEX tasks_later ON tasks (not_before)
  WHERE status = 'pending' AND not_before IS NOT NULL;
CREATE INDEX tasks_line ON tasks (priority DESC, seq) WHERE status = 'pending';
CREATE INDEX tasks_age ON tasks (created_at) WHERE status = 'pending';
CREATE INDEX tasks_processing ON tasks (seq) WHERE status = 'processing';

CREATE INDEX tasks_canceling ON tasks (seq) WHERE status = 'processing' AND canceling;
CREATE INDEX tasks_status ON tasks (status, seq);
CREATE INDEX tasks_model ON tasks (model, seq);
CREATE INDEX tasks_status_model ON tasks (status, model, seq);
CREATE INDEX tasks_unretried ON tasks (error_code, seq)
  WHERE status = 'failed' AND retried_as IS NULL;
CREATE INDEX tasks_unretried_line ON tasks (seq)
  WHERE status = 'failed' AND retried_as IS NULL;

CREATE INDEX tasks_finished ON tasks (finished_at) WHERE finished_at IS NOT NULL;

-- How many calls took at most so many seconds; 9e999 is infinity.
CREATE TABLE buckets (le REAL PRIMARY KEY, calls INTEGER NOT NULL DEFAULT 0) STRICT;
INSERT INTO buckets (le) VALUES (0.5), (1), (2.5), (5), (10), (20), (40), (80), (160), (320),
  (640), (9e999);

CREATE TABLE idempotency (
  client TEXT NOT NULL,
  key TEXT NOT NULL,
  fingerprint TEXT NOT NULL,
  task TEXT NOT NULL, -- or tasks, separated by spaces
  created REAL NOT NULL,
  PRIMARY KEY (client, key)
) STRICT;
CREATE INDEX idempotency_created ON idempotency (created);

CREATE TABLE removals (id TEXT PRIMARY KEY) STRICT, WITHOUT ROWID;

CREATE TABLE calls (
  task TEXT NOT NULL,
  number INTEGER NOT NULL,
  started REAL NOT NULL,
  seconds REAL,
  http_status INTEGER,
  outcome TEXT,
  invocation_id TEXT,
  PRIMARY KEY (task, number)
) STRICT, WITHOUT ROWID;
CREATE INDEX calls_started ON calls (started);

CREATE TABLE holds (
  model TEXT PRIMARY KEY,
  reason TEXT NOT NULL,
  until REAL NOT NULL,
  step REAL NOT NULL,
  room INTEGER NOT NULL,
  probe TEXT
) STRICT;

CREATE TABLE queue (
  id INTEGER PRIMARY KEY CHECK (id = 1),
  paused INTEGER NOT NULL DEFAULT 0,
  pause_reason TEXT,
  quota_total ANY,
  quota_used ANY,
  quota_remaining ANY,
  upstream_seconds REAL NOT NULL DEFAULT 0,
  image_bytes INTEGER NOT NULL DEFAULT 0
) STRICT;
INSERT INTO queue (id) VALUES (1);

-- version 2

-- How many tasks there are, by status and error_code: counted as they change, in the same
-- transaction, since to count them anew takes as long as there are many.
CREATE TABLE counts (
  status TEXT NOT NULL,
  error_code TEXT NOT NULL, -- '' where there is none
  tasks INTEGER NOT NULL,
  PRIMARY KEY (status, error_code)
) STRICT, WITHOUT ROWID;
INSERT INTO counts SELECT status, coalesce(error_code, ''), count(*) FROM tasks GROUP BY 1, 2;

CREATE TRIGGER tasks_added AFTER INSERT ON tasks BEGIN
  INSERT INTO counts VALUES (new.status, coalesce(new.error_code, ''), 1)
    ON CONFLICT DO UPDATE SET tasks = tasks + 1;
END;
CREATE TRIGGER tasks_deleted AFTER DELETE ON tasks BEGIN
  UPDATE counts SET tasks = tasks - 1
    WHERE status = old.status AND error_code = coalesce(old.error_code, '');
END;
CREATE TRIGGER tasks_changed AFTER UPDATE OF status, error_code ON tasks BEGIN
  UPDATE counts SET tasks = tasks - 1
    WHERE status = old.status AND error_code = coalesce(old.error_code, '');
  INSERT INTO counts VALUES (new.status, coalesce(new.error_code, ''), 1)
    ON CONFLICT DO UPDATE SET tasks = tasks + 1;
END;

-- version 3

-- Those that "retry all" means: what was canceled is no failure.
DROP INDEX tasks_unretried_line;
CREATE INDEX tasks_unretried_line ON tasks (seq)
  WHERE status = 'failed' AND retried_as IS NULL AND error_code != 'canceled';

-- A day's calls are those that were sent, or may have been: one under way, or cut by a death.
ALTER TABLE calls ADD COLUMN sent INTEGER NOT NULL DEFAULT 1;
UPDATE calls SET sent = 0 WHERE outcome = 'unavailable' AND http_status IS NULL;
CREATE INDEX calls_sent ON calls (started, sent) WHERE sent;

ALTER TABLE tasks ADD COLUMN lost_images INTEGER NOT NULL DEFAULT 0;

-- What has failed by the cause of a pause of the queue's own, until a resume.
ALTER TABLE queue ADD COLUMN pause_code TEXT;
ALTER TABLE queue ADD COLUMN failed_meanwhile INTEGER NOT NULL DEFAULT 0;

-- The file of a deleted task: of the Node server's tasks it may have another name than the id.
ALTER TABLE removals ADD COLUMN file_path TEXT;

-- The Node server's tasks, by the names of their files: a completed task of ours had a call.
CREATE INDEX tasks_taken_over
  ON tasks (substr(file_path, length(rtrim(file_path, replace(file_path, '/', ''))) + 1))
  WHERE calls = 0 AND file_path IS NOT NULL;

CREATE INDEX tasks_error_code ON tasks (error_code, seq) WHERE error_code IS NOT NULL;

-- The words of the prompts; the prompts themselves are in tasks alone.
CREATE VIRTUAL TABLE prompts USING fts5 (
  prompt, content = 'tasks', content_rowid = 'seq', columnsize = 0,
  tokenize = 'unicode61 remove_diacritics 2'
);
-- Each task that is added writes a page of the index: a small one.
INSERT INTO prompts (prompts, rank) VALUES ('pgsz', 1000);
INSERT INTO prompts (prompts) VALUES ('rebuild');

CREATE TRIGGER prompts_added AFTER INSERT ON tasks BEGIN
  INSERT INTO prompts (rowid, prompt) VALUES (new.seq, new.prompt);
END;
CREATE TRIGGER prompts_deleted AFTER DELETE ON tasks BEGIN
  INSERT INTO prompts (prompts, rowid, prompt) VALUES ('delete', old.seq, old.prompt);
END;
CREATE TRIGGER prompts_changed AFTER UPDATE OF prompt ON tasks BEGIN
  INSERT INTO prompts (prompts, rowid, prompt) VALUES ('delete', old.seq, old.prompt);
  INSERT INTO prompts (rowid, prompt) VALUES (new.seq, new.prompt);
END;

ALTER TABLE tasks ADD COLUMN retry_of TEXT;
UPDATE tasks SET retry_of = old.id FROM tasks AS old WHERE old.retried_as = tasks.id;

-- How many calls were ever sent, by model: kept when their tasks are deleted, of so many models
-- that a list of them stays short.
CREATE TABLE calls_by_model (model TEXT PRIMARY KEY, calls INTEGER NOT NULL) STRICT, WITHOUT ROWID;

-- Chutes' catalogue: what is known of its models, the busiest first, and all names of each.
CREATE TABLE catalogue (
  id INTEGER PRIMARY KEY CHECK (id = 1),
  read_at REAL,
  tried_at REAL,
  is_reading INTEGER NOT NULL DEFAULT 0,
  error TEXT
) STRICT;
INSERT INTO catalogue (id) VALUES (1);
CREATE TABLE catalogue_models (position INTEGER PRIMARY KEY, entry TEXT NOT NULL) STRICT;
CREATE TABLE catalogue_names (name TEXT PRIMARY KEY, position INTEGER NOT NULL)
  STRICT, WITHOUT ROWID;

ALTER TABLE calls ADD COLUMN host TEXT;
-- Whether a retry chooses the seed anew.
ALTER TABLE tasks ADD COLUMN seed_chosen INTEGER NOT NULL DEFAULT 0;

-- version 4

-- The images that a task edits: files of INPUT_DIR, named by sha256 and extension.
CREATE TABLE inputs (
  task TEXT NOT NULL,
  position INTEGER NOT NULL,
  content_type TEXT NOT NULL,
  extension TEXT NOT NULL,
  bytes INTEGER NOT NULL,
  width INTEGER NOT NULL,
  height INTEGER NOT NULL,
  sha256 TEXT NOT NULL,
  PRIMARY KEY (task, position)
) STRICT, WITHOUT ROWID;
CREATE INDEX inputs_sha256 ON inputs (sha256);

-- The names of files whose task is deleted: they go where no other task has them.
CREATE TABLE unused_inputs (name TEXT PRIMARY KEY) STRICT, WITHOUT ROWID;

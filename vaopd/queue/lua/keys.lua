-- The keys of one job, in the order of connection.KEY_NAMES. Every script gets all of them, so that a cluster can tell
-- their slot; the hash tag {job} puts them into the same one.
local K = {
  requests = KEYS[1], groups = KEYS[2], seen_requests = KEYS[3], seen_groups = KEYS[4], policies = KEYS[5],
  policy = KEYS[6], dead = KEYS[7], trainer = KEYS[8], epoch = KEYS[9], workers = KEYS[10],
  last_trainer = KEYS[11],
}

#!lua flags=allow-oom
-- include keys.lua
-- include fence_lease.lua
-- ARGV: worker, entry id, delivery count. The entry goes to a consumer that nobody is, idle for a day: takeable at once.
-- The delivery is given back, since handing back is not a death.
if not owns(ARGV[2], ARGV[1], ARGV[3]) then return {'lost'} end
redis.call('XCLAIM', K.requests, 'rollout', '(released)', 0, ARGV[2], 'IDLE', 86400000, 'RETRYCOUNT', ARGV[3] - 1, 'JUSTID')
return {'ok'}

#!lua
-- include keys.lua
-- include fence_trainer.lua
-- Idempotent publish. ARGV: 3 dedupe key, 4 body. Refused as a whole when memory is full (no allow-oom).
if redis.call('HEXISTS', K.seen_requests, ARGV[3]) == 1 then return {'ok', 0} end
local id = redis.call('XADD', K.requests, '*', 'key', ARGV[3], 'body', ARGV[4])
redis.call('HSET', K.seen_requests, ARGV[3], id)
return {'ok', 1}

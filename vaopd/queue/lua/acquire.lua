#!lua flags=allow-oom
-- include keys.lua
-- Takes the job for one trainer. ARGV: owner, lease in ms. Allowed when memory is full, as join.lua.
local holder = redis.call('GET', K.trainer)
if holder and holder ~= ARGV[1] then return {'held', holder, redis.call('PTTL', K.trainer)} end
redis.call('SET', K.trainer, ARGV[1], 'PX', ARGV[2])
redis.call('SET', K.last_trainer, ARGV[1])
return {'ok', redis.call('GET', K.epoch)}

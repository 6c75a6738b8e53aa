#!lua flags=allow-oom
-- include keys.lua
-- Takes the job again for the trainer (ARGV[2]) that held it last, when its lease ran out because Redis or the trainer
-- stood still. Refused when another trainer has taken it since, even if that one has ended. ARGV: epoch, owner, lease in ms.
if redis.call('GET', K.epoch) ~= ARGV[1] then return {'epoch'} end
local holder, last = redis.call('GET', K.trainer), redis.call('GET', K.last_trainer)
if (holder and holder ~= ARGV[2]) or last ~= ARGV[2] then return {'lost', holder or ''} end
redis.call('SET', K.trainer, ARGV[2], 'PX', ARGV[3])
return {'ok'}

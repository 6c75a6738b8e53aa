#!lua flags=allow-oom
-- include keys.lua
-- Creates what a job needs; again and again does no harm. May run when memory is full: whoever joins then is the one who
-- acknowledges and frees memory. ARGV: a random id, which becomes the epoch of a Redis that has none.
for stream, group in pairs({[K.requests] = 'rollout', [K.groups] = 'trainer'}) do
  local made = redis.pcall('XGROUP', 'CREATE', stream, group, '0', 'MKSTREAM')
  if made.err and not string.find(made.err, 'BUSYGROUP') then return made end
end
redis.call('SETNX', K.epoch, ARGV[1])
return {'ok', redis.call('GET', K.epoch)}

#!lua flags=allow-oom
-- include keys.lua
-- Creates what a job needs; again and again does no harm. May run when memory is full: whoever joins then is the one who
-- acknowledges and frees memory. ARGV: a random id, which becomes the epoch of a Redis that has none.
-- Epoch, streams and groups are made together and removed by nothing but purge. Where one of them is gone (DEL, eviction),
-- entries or deliveries are lost while the records say that they are there: so the others go too, and the trainer, which
-- finds another epoch, publishes again from its own record.
local groups, whole = {[K.requests] = 'rollout', [K.groups] = 'trainer'}, redis.call('EXISTS', K.epoch) == 1
for stream in pairs(groups) do
  local found = redis.pcall('XINFO', 'GROUPS', stream)
  if found.err and string.find(found.err, 'WRONGTYPE') then return found end
  whole = whole and not found.err and #found > 0
end
if not whole then
  redis.call('DEL', K.epoch, K.requests, K.groups, K.seen_requests, K.seen_groups)
  for stream, group in pairs(groups) do redis.call('XGROUP', 'CREATE', stream, group, '0', 'MKSTREAM') end
  redis.call('SET', K.epoch, ARGV[1])
end
return {'ok', redis.call('GET', K.epoch)}

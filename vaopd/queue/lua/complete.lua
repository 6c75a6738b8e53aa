#!lua flags=allow-oom
-- include keys.lua
-- include fence_lease.lua
-- The one commit of a request: publishes the group and removes the request, or does nothing at all.
-- ARGV: worker, entry id, delivery count, dedupe key, group. Goes on when memory is full: it trades a request, images and
-- all, for a group. Were it refused, a Redis full of requests would never empty.
local commit = ARGV[1] .. ' ' .. ARGV[2] .. ' ' .. ARGV[3]
local seen = redis.call('HGET', K.seen_groups, ARGV[4])
if not owns(ARGV[2], ARGV[1], ARGV[3]) then
  -- Committed by this very call, whose reply was lost?
  if seen == commit then return {'ok', 1} end
  return {'lost'}
end
if not seen then
  redis.call('XADD', K.groups, '*', 'key', ARGV[4], 'body', ARGV[5])
  redis.call('HSET', K.seen_groups, ARGV[4], commit)
end
redis.call('XACK', K.requests, 'rollout', ARGV[2])
redis.call('XDEL', K.requests, ARGV[2])
return {'ok', seen and 0 or 1}

#!lua flags=allow-oom
-- include keys.lua
-- include fence_trainer.lua
-- ARGV[3]: records of policy versions before this one go. Dedupe keys end in @version.
local before, removed = tonumber(ARGV[3]), 0
for _, records in ipairs({K.seen_requests, K.seen_groups}) do
  for _, key in ipairs(redis.call('HKEYS', records)) do
    if tonumber(string.match(key, '@(%d+)$')) < before then removed = removed + redis.call('HDEL', records, key) end
  end
end
local latest = redis.call('GET', K.policy)
for _, version in ipairs(redis.call('HKEYS', K.policies)) do
  if tonumber(version) < before and version ~= latest then redis.call('HDEL', K.policies, version) end
end
return {'ok', removed}
